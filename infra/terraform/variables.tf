variable "region" {
  description = "AWS region of everything, such as eu-central-1."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "The region must be one like eu-central-1."
  }
}

variable "name" {
  description = "Beginning of the names of policies, roles and database, and value of the tag `project`."
  type        = string
  default     = "sfgrpo"

  validation {
    condition     = can(regex("^[a-z][a-z0-9]*(-[a-z0-9]+)*$", var.name)) && length(var.name) <= 40
    error_message = "The name must have at most 40 small letters, digits and single hyphens, and start with a letter."
  }
}

variable "bucket" {
  description = "Name of the bucket, which nobody else in the world may have."
  type        = string

  validation {
    # No dots: the certificate of S3 does not cover names with dots, and all access is by TLS.
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "The bucket must have 3 to 63 small letters, digits and hyphens, and neither start nor end in a hyphen."
  }
}

variable "kms_key_arn" {
  description = "KMS key that encrypts bucket and database; null leaves the bucket to SSE-S3 and the database to the key of RDS. Its key policy must let IAM policies of the account grant its use."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", var.kms_key_arn))
    error_message = "The key must be given by its ARN, arn:aws:kms:REGION:ACCOUNT:key/ID; the ARN of an alias does not do."
  }
}

variable "noncurrent_days" {
  description = "Days for which what was deleted or overwritten can be had back, by folder of the bucket."
  type = object({
    runs   = optional(number, 7)
    mlflow = optional(number, 30)
    dvc    = optional(number, 30)
  })
  default = {}

  validation {
    condition     = alltrue([for days in values(var.noncurrent_days) : days >= 1 && floor(days) == days])
    error_message = "The days must be whole numbers from 1 on."
  }
}

variable "trust" {
  description = <<-TEXT
    Who may take which role: by name of the role, ARNs of AWS principals, and subjects of an OIDC provider, such as
    system:serviceaccount:NAMESPACE:NAME of a Kubernetes cluster. Roles that are absent here are not made.
  TEXT
  type = map(object({
    principals = optional(list(string), [])
    oidc = optional(object({
      provider_arn = string
      subjects     = list(string)
      audience     = optional(string, "sts.amazonaws.com")
    }))
  }))

  validation {
    condition     = alltrue([for role in keys(var.trust) : contains(keys(local.rights), role)])
    error_message = "The roles are trainer, evaluator, publisher, promoter, collector, mlflow and flow."
  }

  validation {
    condition     = alltrue([for trusted in values(var.trust) : length(trusted.principals) > 0 || trusted.oidc != null])
    error_message = "Each role needs principals, oidc or both."
  }

  validation {
    condition = alltrue([
      for principal in flatten(values(var.trust)[*].principals) :
      can(regex("^arn:[a-z-]+:iam::[0-9]{12}:(root|user/[^*]+|role/[^*]+)$", principal))
    ])
    error_message = "A principal must be the ARN of an account's root, a user or a role, without wildcards."
  }

  validation {
    condition = alltrue([
      for oidc in [for trusted in values(var.trust) : trusted.oidc if trusted.oidc != null] :
      can(regex("^arn:[a-z-]+:iam::[0-9]{12}:oidc-provider/.+$", oidc.provider_arn))
    ])
    error_message = "An OIDC provider must be given by its ARN, arn:aws:iam::ACCOUNT:oidc-provider/ISSUER."
  }

  validation {
    condition = alltrue([
      for oidc in [for trusted in values(var.trust) : trusted.oidc if trusted.oidc != null] :
      length(oidc.subjects) > 0 && alltrue([for subject in oidc.subjects : can(regex("^[^*?]+$", subject))])
    ])
    error_message = "An OIDC provider needs subjects, and each must be one identity: no wildcards."
  }
}

variable "database" {
  description = "PostgreSQL for MLflow, and Prefect if wished, that can be reached from the security groups of its clients; null makes none."
  type = object({
    vpc_id                    = string
    subnet_ids                = list(string)
    client_security_group_ids = list(string)
    instance_class            = optional(string, "db.t4g.medium")
    storage_gib               = optional(number, 50)
    multi_az                  = optional(bool, false)
    backup_days               = optional(number, 14)
  })
  default = null

  validation {
    condition     = try(length(var.database.subnet_ids) >= 2, var.database == null)
    error_message = "The database needs two subnets or more, in different availability zones."
  }

  validation {
    condition     = try(length(var.database.client_security_group_ids) >= 1, var.database == null)
    error_message = "The database needs the security groups of its clients, or nobody can reach it."
  }

  validation {
    condition     = try(var.database.storage_gib >= 20 && var.database.storage_gib <= 16384, var.database == null)
    error_message = "The database needs 20 to 16384 GiB of storage."
  }

  validation {
    condition     = try(var.database.backup_days >= 1 && var.database.backup_days <= 35, var.database == null)
    error_message = "Backups of the database can be kept for 1 to 35 days."
  }
}
