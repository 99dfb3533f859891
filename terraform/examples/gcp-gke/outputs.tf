output "cloudckpt_root" {
  description = "The root of the run: cloudckpt ls \"$(terraform output -raw cloudckpt_root)\"."
  value       = "${module.checkpoints.cloudckpt_root}/${var.run}"
}

output "manifests" {
  description = "Service accounts, the training job and a nightly gc for Kubernetes: terraform output -raw manifests | kubectl apply -f -"
  value = templatefile("${path.module}/job.yaml.tftpl", {
    environment     = module.checkpoints.environment
    root            = "${module.checkpoints.cloudckpt_root}/${var.run}"
    namespace       = var.namespace
    service_account = var.service_account
    run             = var.run
    image           = var.image
  })
}
