output "mirror" {
  description = "Value of SFGRPO_MIRROR."
  value       = "s3://${aws_s3_bucket.this.id}/runs"
}

output "mlflow_artifact_root" {
  description = "Value of --default-artifact-root, or of --artifacts-destination, of the MLflow server."
  value       = "s3://${aws_s3_bucket.this.id}/mlflow"
}

output "dvc_remote" {
  description = "Address of the DVC remote."
  value       = "s3://${aws_s3_bucket.this.id}/dvc"
}

output "policy_arns" {
  description = "ARNs of the policies by role, for identities that are made elsewhere."
  value       = { for role, policy in aws_iam_policy.role : role => policy.arn }
}

output "role_arns" {
  description = "ARNs of the roles that were made, by name."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}

output "database" {
  description = "Endpoint of the database, and ARN of the secret that holds its user and password; null without one."
  value = one([
    for database in aws_db_instance.this :
    { endpoint = database.endpoint, secret_arn = database.master_user_secret[0].secret_arn }
  ])
}
