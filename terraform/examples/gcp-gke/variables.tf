variable "project" {
  description = "The project of cluster and bucket. The cluster has Workload Identity Federation for GKE (Autopilot has it)."
  type        = string
}

variable "location" {
  description = "The region of cluster and bucket."
  type        = string
}

variable "bucket_name" {
  description = "Name of the bucket that is made."
  type        = string
}

variable "namespace" {
  description = "The Kubernetes namespace of the job."
  type        = string
  default     = "training"
}

variable "service_account" {
  description = "The Kubernetes service account of the job; the sweeper's is this with -sweeper behind it."
  type        = string
  default     = "trainer"
}

variable "run" {
  description = "Name of the run: its folder under the root."
  type        = string
  default     = "demo"
}

variable "image" {
  description = "An image with Python, PyTorch and cloudckpt[gcs], and train.py in its working folder."
  type        = string
}

variable "readers" {
  description = "Members that may read checkpoints, as IAM spells them: user:…, group:…, serviceAccount:…"
  type        = list(string)
  default     = []
}
