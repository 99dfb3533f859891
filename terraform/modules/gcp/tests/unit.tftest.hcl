# Run with mocks: no project, no credentials. `terraform test`, or `make terraform` at the repository's root.

mock_provider "google" {}

variables {
  project     = "p"
  bucket_name = "ckpt-test"
  location    = "europe-west4"
  prefix      = "team/runs"
}

run "defaults" {
  command = apply

  assert {
    condition     = google_storage_bucket.this.public_access_prevention == "enforced" && google_storage_bucket.this.uniform_bucket_level_access && !google_storage_bucket.this.force_destroy
    error_message = "The bucket can be made public, or destroy takes the objects along."
  }

  assert {
    condition     = google_storage_bucket.this.soft_delete_policy[0].retention_duration_seconds == 0
    error_message = "Deleted checkpoints are billed although nobody asked for it."
  }

  assert {
    condition = alltrue(flatten([
      for r in google_storage_bucket.this.lifecycle_rule : [for c in r.condition : c.with_state == "ARCHIVED"]
      if anytrue([for a in r.action : a.type == "Delete"])
    ]))
    error_message = "A rule deletes live checkpoints."
  }

  assert {
    condition     = alltrue(flatten([for r in google_storage_bucket.this.lifecycle_rule : [for c in r.condition : coalesce(c.num_newer_versions, 0) == 0]]))
    error_message = "An old version waits for newer ones, which a name that is written once never has."
  }

  assert {
    condition = anytrue(flatten([
      for r in google_storage_bucket.this.lifecycle_rule : [for c in r.condition : length(c.matches_suffix) == 0 && c.days_since_noncurrent_time == 30]
      if anytrue([for a in r.action : a.type == "Delete"])
    ]))
    error_message = "Old versions with another ending stay for good."
  }

  assert {
    condition     = anytrue(flatten([for r in google_storage_bucket.this.lifecycle_rule : [for a in r.action : a.type == "AbortIncompleteMultipartUpload"]]))
    error_message = "Unfinished uploads are not cleaned up."
  }

  assert {
    condition     = toset(google_project_iam_custom_role.this["reader"].permissions) == toset(["storage.objects.get", "storage.objects.list"])
    error_message = "The reader has other permissions than to get and to list."
  }

  assert {
    condition     = length(google_storage_bucket_iam_member.this) == 0 && length(google_service_account.this) == 0
    error_message = "Somebody has a role although nobody was named."
  }

  assert {
    condition     = output.cloudckpt_root == "gs://ckpt-test/team/runs" && output.environment["CLOUDCKPT_ROOT"] == "gs://ckpt-test/team/runs"
    error_message = "The outputs do not lead to the runs."
  }

  assert {
    condition     = strcontains(output.condition, "objects/team/runs/") && strcontains(output.condition, ".startsWith(\"team/runs/\")")
    error_message = "The condition does not confine to the prefix."
  }
}

run "who" {
  command = apply

  variables {
    project_number = "123"
    trainer        = { gke = ["train/trainer"] }
    reader         = { service_account = true }
    sweeper        = { members = ["group:ops@example.com"] }
  }

  assert {
    condition     = google_storage_bucket_iam_member.this["trainer:gke:train/trainer"].member == "principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/p.svc.id.goog/subject/ns/train/sa/trainer"
    error_message = "The Kubernetes service account is spelled wrongly."
  }

  assert {
    condition     = alltrue([for m in google_storage_bucket_iam_member.this : m.condition[0].expression == output.condition])
    error_message = "A role is bound without its condition."
  }

  assert {
    condition     = toset(keys(google_storage_bucket_iam_member.uploads)) == toset(["trainer:gke:train/trainer", "sweeper:member:0"])
    error_message = "Somebody else than those who abort uploads lists them."
  }

  assert {
    condition     = toset(keys(google_service_account.this)) == toset(["reader"])
    error_message = "A service account is missing, or made for nobody."
  }

  assert {
    condition     = google_service_account.this["reader"].account_id == "cloudckpt-reader"
    error_message = "The service account is named otherwise than the roles."
  }
}

run "another_bucket_of_the_project" {
  command = apply

  variables {
    role_id_prefix = "Team_A.checkpoints_of_everybody"
    trainer        = { service_account = true }
  }

  assert {
    condition     = google_service_account.this["trainer"].account_id == "team-a-checkpoints-of--trainer"
    error_message = "Two buckets would make one service account, or its id is longer than the 30 characters there may be."
  }
}

run "without_versions" {
  command = apply

  variables {
    versioning = false
  }

  assert {
    condition     = !anytrue(flatten([for r in google_storage_bucket.this.lifecycle_rule : [for a in r.action : a.type == "Delete"]]))
    error_message = "Something is deleted although there are no old versions."
  }
}

run "own_key" {
  command = apply

  variables {
    kms_key = { id = "projects/p/locations/europe-west4/keyRings/r/cryptoKeys/k" }
  }

  assert {
    condition     = google_storage_bucket.this.encryption[0].default_kms_key_name == "projects/p/locations/europe-west4/keyRings/r/cryptoKeys/k" && length(google_kms_crypto_key_iam_member.bucket) == 1
    error_message = "The bucket does not use the key, or may not."
  }
}

run "a_project_number_is_needed_for_gke" {
  command = plan

  variables {
    trainer = { gke = ["train/trainer"] }
  }

  expect_failures = [google_storage_bucket_iam_member.this]
}

run "three_days_of_soft_delete_cannot_be" {
  command = plan

  variables {
    soft_delete_days = 3
  }

  expect_failures = [var.soft_delete_days]
}

run "a_wildcard_in_the_prefix_is_refused" {
  command = plan

  variables {
    prefix = "team/*"
  }

  expect_failures = [var.prefix]
}

run "everybody_is_no_member" {
  command = plan

  variables {
    trainer = { members = ["allUsers"] }
    reader  = { members = ["allAuthenticatedUsers"] }
    sweeper = { members = ["group:ops@example.com", "allUsers"] }
  }

  expect_failures = [var.trainer, var.reader, var.sweeper]
}
