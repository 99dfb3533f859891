terraform {
  # OpenTofu counts from 1.6 as well; the tests need 1.7 (Terraform) or 1.8 (OpenTofu) for their mocks.
  required_version = ">= 1.6"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0, < 9.0"
    }
  }
}
