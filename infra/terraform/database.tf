locals {
  postgres_port = 5432
}

resource "aws_db_subnet_group" "this" {
  count = var.database == null ? 0 : 1

  name       = var.name
  subnet_ids = var.database.subnet_ids
}

resource "aws_security_group" "database" {
  count = var.database == null ? 0 : 1

  name        = "${var.name}-database"
  description = "PostgreSQL of ${var.name}, for its clients only"
  vpc_id      = var.database.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  # By position: a security group that is made in the same plan has no id yet.
  count = var.database == null ? 0 : length(var.database.client_security_group_ids)

  security_group_id            = aws_security_group.database[0].id
  referenced_security_group_id = var.database.client_security_group_ids[count.index]
  ip_protocol                  = "tcp"
  from_port                    = local.postgres_port
  to_port                      = local.postgres_port
}

resource "aws_db_instance" "this" {
  count = var.database == null ? 0 : 1

  identifier     = var.name
  engine         = "postgres"
  engine_version = "17" # refuses connections without TLS by itself, as all from 15 on
  instance_class = var.database.instance_class
  db_name        = "mlflow"
  port           = local.postgres_port
  multi_az       = var.database.multi_az

  # RDS makes the password, keeps it in Secrets Manager and renews it: neither plan nor state has it.
  username                    = "administrator"
  manage_master_user_password = true

  storage_type      = "gp3"
  allocated_storage = var.database.storage_gib
  storage_encrypted = true
  kms_key_id        = var.kms_key_arn

  publicly_accessible    = false
  db_subnet_group_name   = aws_db_subnet_group.this[0].name
  vpc_security_group_ids = [aws_security_group.database[0].id]

  backup_retention_period   = var.database.backup_days
  copy_tags_to_snapshot     = true
  deletion_protection       = true
  delete_automated_backups  = false
  skip_final_snapshot       = false
  final_snapshot_identifier = "${var.name}-final"
}
