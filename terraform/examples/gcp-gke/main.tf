# A training job on an existing GKE cluster, as a Kubernetes service account without any key, and a bucket for its
# checkpoints.

terraform {
  required_version = ">= 1.6"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0, < 9.0"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.location
}

data "google_project" "this" {
  project_id = var.project
}

module "checkpoints" {
  source = "../../modules/gcp"

  project        = var.project
  project_number = data.google_project.this.number
  bucket_name    = var.bucket_name
  location       = var.location
  prefix         = "runs"
  trainer        = { gke = ["${var.namespace}/${var.service_account}"] }
  reader         = { members = var.readers }
  sweeper        = { gke = ["${var.namespace}/${var.service_account}-sweeper"] }
}
