output "cloudckpt_root" {
  description = "The root of the run: cloudckpt ls \"$(terraform output -raw cloudckpt_root)\"."
  value       = "${module.checkpoints.cloudckpt_root}/${var.run}"
}

output "role_arns" {
  description = "The roles that were made, by role."
  value       = module.checkpoints.role_arns
}
