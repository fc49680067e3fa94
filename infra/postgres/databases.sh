#!/bin/sh
# Makes a role and a database for each of the two servers; PostgreSQL's image runs it once, when its volume is empty.
set -eu
for name in prefect mlflow; do
    psql --set ON_ERROR_STOP=1 --set name="$name" --set password="$(cat "/run/secrets/${name}_database_password")" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
