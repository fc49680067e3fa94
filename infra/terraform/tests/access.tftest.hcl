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

run "each_role_has_its_rights_and_no_others" {
  command = plan

  assert {
    condition = {
      for role, policy in aws_iam_policy.role : role => toset(flatten([
        for statement in jsondecode(policy.policy).Statement :
        [for pair in setproduct(statement.Action, statement.Resource) : "${pair[0]} ${pair[1]}" if statement.Effect == "Allow"]
      ]))
      } == {
      trainer = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:DeleteObject arn:aws:s3:::example-sfgrpo/runs/*",
      ])
      evaluator = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/mlflow/*",
      ])
      publisher = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/dvc/*",
      ])
      promoter = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/mlflow/*",
      ])
      collector = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:DeleteObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:DeleteObject arn:aws:s3:::example-sfgrpo/runs/*",
      ])
      mlflow = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/mlflow/*",
        "s3:DeleteObject arn:aws:s3:::example-sfgrpo/mlflow/*",
      ])
      flow = toset([
        "s3:ListBucket arn:aws:s3:::example-sfgrpo",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:GetObject arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:PutObject arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/dvc/*",
        "s3:AbortMultipartUpload arn:aws:s3:::example-sfgrpo/runs/*",
        "s3:DeleteObject arn:aws:s3:::example-sfgrpo/runs/*",
      ])
    }
    error_message = "A role has lost a right, or gained one."
  }
}

run "nobody_can_delete_for_good" {
  command = plan

  assert {
    condition     = alltrue([for policy in aws_iam_policy.role : !strcontains(policy.policy, "s3:DeleteObjectVersion")])
    error_message = "Versions go by the lifecycle alone."
  }

  assert {
    condition     = alltrue([for policy in aws_iam_policy.role : !strcontains(policy.policy, "s3:*")])
    error_message = "No right may be a wildcard."
  }
}

run "the_key_serves_writers_to_encrypt_and_all_to_decrypt" {
  command = plan

  variables {
    kms_key_arn = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-0000-0000-000000000000"
  }

  assert {
    condition = {
      for role, policy in aws_iam_policy.role :
      role => one([for statement in jsondecode(policy.policy).Statement : toset(statement.Action) if statement.Sid == "Key"])
      } == {
      trainer   = toset(["kms:Decrypt", "kms:GenerateDataKey"])
      evaluator = toset(["kms:Decrypt", "kms:GenerateDataKey"])
      publisher = toset(["kms:Decrypt", "kms:GenerateDataKey"])
      promoter  = toset(["kms:Decrypt"])
      collector = toset(["kms:Decrypt"])
      mlflow    = toset(["kms:Decrypt", "kms:GenerateDataKey"])
      flow      = toset(["kms:Decrypt", "kms:GenerateDataKey"])
    }
    error_message = "A role has another use of the key than it needs."
  }

  assert {
    condition = alltrue(flatten([
      for policy in aws_iam_policy.role : [
        for statement in jsondecode(policy.policy).Statement :
        statement.Resource == [var.kms_key_arn]
        && statement.Condition.StringEquals["kms:ViaService"] == "s3.eu-central-1.amazonaws.com"
        if statement.Sid == "Key"
      ]
    ]))
    error_message = "The key may be used by way of S3 in the region only."
  }
}

run "roles_trust_whom_they_are_told_to" {
  command = plan

  variables {
    trust = {
      trainer = {
        oidc = {
          provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE"
          subjects     = ["system:serviceaccount:training:trainer"]
        }
      }
      collector = { principals = ["arn:aws:iam::123456789012:role/operator"] }
    }
  }

  assert {
    condition     = toset(keys(aws_iam_role.this)) == toset(["trainer", "collector"])
    error_message = "Only roles that somebody may take are made."
  }

  assert {
    condition = jsondecode(aws_iam_role.this["trainer"].assume_role_policy).Statement == [{
      Sid       = "Oidc"
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE" }
      Condition = {
        StringEquals = {
          "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE:aud" = "sts.amazonaws.com"
          "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE:sub" = ["system:serviceaccount:training:trainer"]
        }
      }
    }]
    error_message = "The trainer must be the one service account, and nothing else of its cluster."
  }

  assert {
    condition = jsondecode(aws_iam_role.this["collector"].assume_role_policy).Statement == [{
      Sid       = "Principals"
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { AWS = ["arn:aws:iam::123456789012:role/operator"] }
    }]
    error_message = "The collector must be the one role."
  }
}

run "an_unknown_role_is_refused" {
  command = plan

  variables {
    trust = { trianer = { principals = ["arn:aws:iam::123456789012:role/operator"] } }
  }

  expect_failures = [var.trust]
}

run "a_role_for_nobody_is_refused" {
  command = plan

  variables {
    trust = { trainer = {} }
  }

  expect_failures = [var.trust]
}

run "a_role_for_everybody_is_refused" {
  command = plan

  variables {
    trust = { trainer = { principals = ["*"] } }
  }

  expect_failures = [var.trust]
}

run "a_wildcard_among_subjects_is_refused" {
  command = plan

  variables {
    trust = {
      trainer = {
        oidc = {
          provider_arn = "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE"
          subjects     = ["system:serviceaccount:*:trainer"]
        }
      }
    }
  }

  expect_failures = [var.trust]
}

run "an_issuer_that_is_no_provider_of_the_account_is_refused" {
  command = plan

  variables {
    trust = { trainer = { oidc = { provider_arn = "https://issuer.example", subjects = ["trainer"] } } }
  }

  expect_failures = [var.trust]
}
