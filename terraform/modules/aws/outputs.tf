output "cloudckpt_root" {
  description = "The URL under which runs lie. A run is a folder of it: CheckpointManager(\"ROOT/my-run\")."
  value       = local.root
}

output "environment" {
  description = "Variables for a job: the command line reads CLOUDCKPT_ROOT, the AWS libraries the region."
  value = {
    CLOUDCKPT_ROOT     = local.root
    AWS_DEFAULT_REGION = aws_s3_bucket.this.region
  }
}

output "bucket" {
  description = "The bucket's name."
  value       = aws_s3_bucket.this.bucket
}

output "policy_arns" {
  description = "The policies by role (trainer, reader, sweeper), to attach to roles of your own."
  value       = { for role, policy in aws_iam_policy.this : role => policy.arn }
}

output "role_arns" {
  description = "The roles that were made, by role; for IRSA this is the annotation of the service account."
  value       = { for role, made in aws_iam_role.this : role => made.arn }
}

output "instance_profiles" {
  description = "The names of the instance profiles that were made, by role."
  value       = { for role, profile in aws_iam_instance_profile.this : role => profile.name }
}
