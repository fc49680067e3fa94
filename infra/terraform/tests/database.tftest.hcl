mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws", dns_suffix = "amazonaws.com" }
  }
}

variables {
  region = "eu-central-1"
  bucket = "example-sfgrpo"
  trust  = {}
  database = {
    vpc_id                    = "vpc-1"
    subnet_ids                = ["subnet-1", "subnet-2"]
    client_security_group_ids = ["sg-1"]
  }
}

run "no_database_unless_it_is_asked_for" {
  command = plan

  variables {
    database = null
  }

  assert {
    condition     = length(aws_db_instance.this) + length(aws_db_subnet_group.this) + length(aws_security_group.database) == 0
    error_message = "Nothing of a database may be made."
  }

  assert {
    condition     = output.database == null
    error_message = "There is nothing to give out."
  }
}

run "the_database_is_private_and_encrypted" {
  command = plan

  assert {
    condition     = !aws_db_instance.this[0].publicly_accessible && aws_db_instance.this[0].storage_encrypted
    error_message = "The database must have no public address, and encrypt what it stores."
  }

  assert {
    condition = (
      length(aws_vpc_security_group_ingress_rule.database) == 1
      && aws_vpc_security_group_ingress_rule.database[0].referenced_security_group_id == "sg-1"
      && aws_vpc_security_group_ingress_rule.database[0].cidr_ipv4 == null
      && aws_vpc_security_group_ingress_rule.database[0].from_port == 5432
      && aws_vpc_security_group_ingress_rule.database[0].to_port == 5432
    )
    error_message = "Only its clients may reach it, at one port."
  }
}

run "the_database_is_hard_to_lose" {
  command = plan

  assert {
    condition = (
      aws_db_instance.this[0].deletion_protection
      && !aws_db_instance.this[0].skip_final_snapshot
      && !aws_db_instance.this[0].delete_automated_backups
      && aws_db_instance.this[0].backup_retention_period == 14
    )
    error_message = "It must be protected from deletion, and leave a snapshot and its backups."
  }
}

run "nobody_writes_its_password_down" {
  command = plan

  assert {
    condition     = aws_db_instance.this[0].manage_master_user_password && aws_db_instance.this[0].password == null
    error_message = "RDS must manage the password."
  }
}

run "one_subnet_is_refused" {
  command = plan

  variables {
    database = { vpc_id = "vpc-1", subnet_ids = ["subnet-1"], client_security_group_ids = ["sg-1"] }
  }

  expect_failures = [var.database]
}

run "a_database_without_clients_is_refused" {
  command = plan

  variables {
    database = { vpc_id = "vpc-1", subnet_ids = ["subnet-1", "subnet-2"], client_security_group_ids = [] }
  }

  expect_failures = [var.database]
}

run "a_database_without_backups_is_refused" {
  command = plan

  variables {
    database = {
      vpc_id                    = "vpc-1"
      subnet_ids                = ["subnet-1", "subnet-2"]
      client_security_group_ids = ["sg-1"]
      backup_days               = 0
    }
  }

  expect_failures = [var.database]
}
