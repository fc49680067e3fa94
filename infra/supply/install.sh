#!/bin/sh
# Installs a lock into a virtual environment: install.sh FOLDER LOCK [OPTION OF PIP...]
# pip takes a file only if its SHA-256 is in the lock, and no package that the lock does not name. All are wheels, since
# a source would be built by packages that no lock has.
set -eu
python=$1/bin/python
lock=$2
shift 2
exec "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --require-hashes \
    --only-binary :all: --requirement "$lock" "$@"
