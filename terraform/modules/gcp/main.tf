# The bucket and its guard rails. Who may use it is in iam.tf.

locals {
  key_prefix = var.prefix == "" ? "" : "${var.prefix}/"
  root       = var.prefix == "" ? "gs://${var.bucket_name}" : "gs://${var.bucket_name}/${var.prefix}"

  # By how a name ends. Everything else, such as the probes of the doctor, would stay for good without the last line.
  recovery_days = {
    ".safetensors" = var.recovery_days.data
    ".json"        = var.recovery_days.manifest
    ""             = max(var.recovery_days.data, var.recovery_days.manifest)
  }
}

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62:Access logs go to a bucket that this module must not choose; data access audit logs are the project's
  #checkov:skip=CKV_GCP_78:Versioning is a variable that is on by default; the cost table of the README says why it can be off
  name                        = var.bucket_name
  project                     = var.project
  location                    = var.location
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false
  labels                      = var.labels

  versioning {
    enabled = var.versioning
  }

  # Always written out: left out, Google keeps and bills deleted objects for seven days.
  soft_delete_policy {
    retention_duration_seconds = var.soft_delete_days * 86400
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }

    condition {
      age = var.abort_multipart_days
    }
  }

  # Old versions only (ARCHIVED). What is live is decided by the manifest and by nothing else: a rule by age deletes the
  # best checkpoint of a run that has not improved for a while. Never with num_newer_versions: all conditions of a rule
  # must hold, and a name that is written once has no newer version.
  dynamic "lifecycle_rule" {
    for_each = var.versioning ? local.recovery_days : {}

    content {
      action {
        type = "Delete"
      }

      condition {
        days_since_noncurrent_time = lifecycle_rule.value
        matches_suffix             = lifecycle_rule.key == "" ? [] : [lifecycle_rule.key]
        with_state                 = "ARCHIVED"
      }
    }
  }

  dynamic "encryption" {
    for_each = var.kms_key == null ? [] : [var.kms_key.id]

    content {
      default_kms_key_name = encryption.value
    }
  }

  lifecycle {
    # A check block would only warn.
    postcondition {
      condition = alltrue(flatten([
        for r in self.lifecycle_rule : [for c in r.condition : c.with_state == "ARCHIVED"]
        if anytrue([for a in r.action : a.type == "Delete"])
      ]))
      error_message = "A lifecycle rule would delete live checkpoints."
    }
  }

  depends_on = [google_kms_crypto_key_iam_member.bucket]
}

# Cloud Storage encrypts as itself, so whoever reads and writes needs no right to the key.
data "google_storage_project_service_account" "bucket" {
  count = var.kms_key == null ? 0 : 1

  project = var.project
}

resource "google_kms_crypto_key_iam_member" "bucket" {
  count = var.kms_key == null ? 0 : 1

  crypto_key_id = var.kms_key.id
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${data.google_storage_project_service_account.bucket[0].email_address}"
}
