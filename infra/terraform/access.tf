locals {
  # Folders of the bucket that each role reads, writes and deletes from. Nobody gets s3:DeleteObjectVersion: whatever a
  # role deletes or overwrites can be had back for `noncurrent_days`.
  rights = {
    # Deletes below runs/ only, because the mirror prunes checkpoints there.
    trainer = { read = ["dvc", "runs"], write = ["mlflow", "runs"], delete = ["runs"] }
    # Evaluates and registers: `python -m sfgrpo evaluate`, the comparison and the model registry.
    evaluator = { read = ["dvc", "mlflow", "runs"], write = ["mlflow"], delete = [] }
    # `dvc push`, which looks at what is there first.
    publisher = { read = ["dvc"], write = ["dvc"], delete = [] }
    # Tags and aliases are rows in MLflow's database; the bucket only has the model that is tried out.
    promoter = { read = ["mlflow"], write = [], delete = [] }
    # `dvc gc --cloud`, which reads the lists of folders, and the runs that nobody will take up again.
    collector = { read = ["dvc"], write = [], delete = ["dvc", "runs"] }
    # An MLflow server that serves artifacts itself, in place of its clients.
    mlflow = { read = ["mlflow"], write = ["mlflow"], delete = ["mlflow"] }
    # A flow, which does all stages by one identity. Artifacts go through the MLflow server, whose role is the one above.
    flow = { read = ["dvc", "runs"], write = ["dvc", "runs"], delete = ["runs"] }
  }

  actions = {
    read   = ["s3:GetObject"]
    write  = ["s3:PutObject", "s3:AbortMultipartUpload"]
    delete = ["s3:DeleteObject"]
  }

  # An upload in parts needs kms:Decrypt as well, which every role has.
  kms_actions = {
    for role, rights in local.rights :
    role => concat(["kms:Decrypt"], length(rights.write) > 0 ? ["kms:GenerateDataKey"] : [])
  }
}

resource "aws_iam_policy" "role" {
  for_each = local.rights

  name        = "${var.name}-${each.key}"
  description = "What the ${each.key} of ${var.name} does in the bucket ${var.bucket}"

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      [
        {
          # On the whole bucket: with a condition on the prefix S3 answers 403 instead of 404 for an object that is
          # absent, and neither the mirror nor DVC could tell that from a refusal.
          Sid      = "List"
          Effect   = "Allow"
          Action   = ["s3:ListBucket"]
          Resource = [local.bucket_arn]
        }
      ],
      [
        for right in ["read", "write", "delete"] : {
          Sid      = title(right)
          Effect   = "Allow"
          Action   = local.actions[right]
          Resource = [for folder in each.value[right] : "${local.bucket_arn}/${folder}/*"]
        } if length(each.value[right]) > 0
      ],
      [
        for key in compact([var.kms_key_arn]) : {
          Sid       = "Key"
          Effect    = "Allow"
          Action    = local.kms_actions[each.key]
          Resource  = [key]
          Condition = { StringEquals = { "kms:ViaService" = "s3.${var.region}.${data.aws_partition.current.dns_suffix}" } }
        }
      ],
    )
  })
}

resource "aws_iam_role" "this" {
  for_each = var.trust

  name        = "${var.name}-${each.key}"
  description = "The ${each.key} of ${var.name}"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      [
        for principals in [each.value.principals] : {
          Sid       = "Principals"
          Effect    = "Allow"
          Action    = "sts:AssumeRole"
          Principal = { AWS = principals }
        } if length(principals) > 0
      ],
      [
        for oidc in each.value.oidc[*] : {
          Sid       = "Oidc"
          Effect    = "Allow"
          Action    = "sts:AssumeRoleWithWebIdentity"
          Principal = { Federated = oidc.provider_arn }
          Condition = {
            StringEquals = {
              "${split(":oidc-provider/", oidc.provider_arn)[1]}:aud" = oidc.audience
              "${split(":oidc-provider/", oidc.provider_arn)[1]}:sub" = oidc.subjects
            }
          }
        }
      ],
    )
  })
}

resource "aws_iam_role_policy_attachment" "this" {
  for_each = var.trust

  role       = aws_iam_role.this[each.key].name
  policy_arn = aws_iam_policy.role[each.key].arn
}
