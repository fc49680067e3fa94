mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws", dns_suffix = "amazonaws.com" }
  }
}

variables {
  region = "eu-central-1"
  bucket = "example-sfgrpo"
  trust  = {}
}

run "the_public_is_shut_out" {
  command = plan

  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.this.block_public_acls,
      aws_s3_bucket_public_access_block.this.block_public_policy,
      aws_s3_bucket_public_access_block.this.ignore_public_acls,
      aws_s3_bucket_public_access_block.this.restrict_public_buckets,
    ])
    error_message = "Public access must be blocked in all four ways."
  }

  assert {
    condition     = one(aws_s3_bucket_ownership_controls.this.rule).object_ownership == "BucketOwnerEnforced"
    error_message = "Access control lists must be off."
  }
}

run "only_new_tls_is_served" {
  command = plan

  assert {
    condition = toset([for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement : jsonencode({
      Effect = statement.Effect, Principal = statement.Principal, Action = statement.Action, Condition = statement.Condition
      })]) == toset([
      jsonencode({ Effect = "Deny", Principal = "*", Action = "s3:*", Condition = { Bool = { "aws:SecureTransport" = "false" } } }),
      jsonencode({ Effect = "Deny", Principal = "*", Action = "s3:*", Condition = { NumericLessThan = { "s3:TlsVersion" = "1.2" } } }),
    ])
    error_message = "The bucket policy must refuse everybody without TLS, or with TLS before 1.2, and grant nothing."
  }

  assert {
    condition = alltrue([
      for statement in jsondecode(aws_s3_bucket_policy.this.policy).Statement :
      toset(statement.Resource) == toset(["arn:aws:s3:::example-sfgrpo", "arn:aws:s3:::example-sfgrpo/*"])
    ])
    error_message = "It must hold for the bucket and for all objects."
  }
}

run "deletions_can_be_undone_for_a_time" {
  command = plan

  variables {
    noncurrent_days = { runs = 3 }
  }

  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "The bucket must keep versions."
  }

  assert {
    condition = {
      for rule in aws_s3_bucket_lifecycle_configuration.this.rule :
      rule.filter[0].prefix => rule.noncurrent_version_expiration[0].noncurrent_days
      if length(rule.noncurrent_version_expiration) > 0
    } == { "runs/" = 3, "mlflow/" = 30, "dvc/" = 30 }
    error_message = "Each folder must keep old versions for its own number of days, and not for ever."
  }

  assert {
    condition = alltrue([
      for rule in aws_s3_bucket_lifecycle_configuration.this.rule :
      alltrue([for expiration in rule.expiration : expiration.expired_object_delete_marker])
    ])
    error_message = "What expires without being an old version may be the mark of a deletion alone."
  }
}

run "uploads_that_were_given_up_go_after_two_days" {
  command = plan

  assert {
    condition = one([
      for rule in aws_s3_bucket_lifecycle_configuration.this.rule :
      rule.abort_incomplete_multipart_upload[0].days_after_initiation
      if rule.id == "abort-uploads" && rule.status == "Enabled"
    ]) == 2
    error_message = "One rule must abort uploads after two days."
  }
}

run "without_a_key_the_bucket_encrypts_by_sse_s3" {
  command = plan

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default[0].sse_algorithm == "AES256"
    error_message = "The algorithm must be AES256."
  }

  assert {
    condition     = alltrue([for policy in aws_iam_policy.role : !strcontains(policy.policy, "kms:")])
    error_message = "No role needs a key then."
  }
}

run "with_a_key_the_bucket_encrypts_by_kms" {
  command = plan

  variables {
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-0000-0000-000000000000"
  }

  assert {
    condition = one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default[0] == {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = var.kms_key_arn
    }
    error_message = "The algorithm must be aws:kms, with the key that was given."
  }

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.this.rule).bucket_key_enabled
    error_message = "The bucket must have a key of its own, or each object is a request to KMS."
  }
}

run "a_name_with_dots_is_refused" {
  command = plan

  variables {
    bucket = "example.sfgrpo"
  }

  expect_failures = [var.bucket]
}

run "an_alias_of_a_key_is_refused" {
  command = plan

  variables {
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:alias/sfgrpo"
  }

  expect_failures = [var.kms_key_arn]
}

run "days_have_to_be_whole" {
  command = plan

  variables {
    noncurrent_days = { dvc = 0.5 }
  }

  expect_failures = [var.noncurrent_days]
}

run "a_region_has_to_look_like_one" {
  command = plan

  variables {
    region = "Frankfurt"
  }

  expect_failures = [var.region]
}

run "a_name_has_to_fit_all_services" {
  command = plan

  variables {
    name = "Sfgrpo_1"
  }

  expect_failures = [var.name]
}
