output "cloudckpt_root" {
  description = "The URL under which runs lie. A run is a folder of it: CheckpointManager(\"ROOT/my-run\")."
  value       = local.root
}

output "environment" {
  description = "Variables for a job: the command line reads CLOUDCKPT_ROOT, Google's libraries the project."
  value = {
    CLOUDCKPT_ROOT       = local.root
    GOOGLE_CLOUD_PROJECT = var.project
  }
}

output "bucket" {
  description = "The bucket's name."
  value       = google_storage_bucket.this.name
}

output "role_ids" {
  description = "The custom roles by role (trainer, reader, sweeper). Bound without the condition they reach the whole bucket."
  value       = { for role, made in google_project_iam_custom_role.this : role => made.id }
}

output "condition" {
  description = "The condition that confines a binding of such a role to the prefix."
  value       = local.under_the_prefix
}

output "service_accounts" {
  description = "The e-mail addresses of the service accounts that were made, by role."
  value       = { for role, account in google_service_account.this : role => account.email }
}
