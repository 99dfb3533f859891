# Who may do what. The permissions come from permissions.json, which tools/generate_terraform.py makes from the table in
# cloudckpt/core/rights.py: change a right there.

locals {
  permissions = jsondecode(file("${path.module}/permissions.json"))
  roles       = toset(["trainer", "reader", "sweeper"])
  who         = { trainer = var.trainer, reader = var.reader, sweeper = var.sweeper }

  # Objects under the prefix, and listings that ask for nothing outside of it.
  under_the_prefix = join(" || ", [
    "resource.name.startsWith(\"projects/_/buckets/${var.bucket_name}/objects/${local.key_prefix}\")",
    "api.getAttribute(\"storage.googleapis.com/objectListPrefix\", \"\").startsWith(\"${local.key_prefix}\")",
  ])

  # At most 30 characters of lower case, which a role's id need not be.
  account_prefix = substr(replace(lower(var.role_id_prefix), "/[^a-z0-9]/", "-"), 0, 22)

  # Keys that are known in a plan, whatever is behind them.
  members = merge([
    for role, who in local.who : merge(
      { for wanted in [who.service_account] : "${role}:service-account" => { role = role, member = "serviceAccount:${google_service_account.this[role].email}" } if wanted },
      { for name in who.gke : "${role}:gke:${name}" => { role = role, member = "${local.pool}/ns/${split("/", name)[0]}/sa/${split("/", name)[1]}" } },
      { for i, member in who.members : "${role}:member:${i}" => { role = role, member = member } },
    )
  ]...)

  pool = "principal://iam.googleapis.com/projects/${var.project_number == null ? "" : var.project_number}/locations/global/workloadIdentityPools/${var.project}.svc.id.goog/subject"
}

resource "google_service_account" "this" {
  for_each = toset([for role, who in local.who : role if who.service_account])

  project      = var.project
  account_id   = "${local.account_prefix}-${each.key}"
  display_name = substr("cloudckpt ${each.key} on ${local.root}", 0, 100)
}

resource "google_project_iam_custom_role" "this" {
  for_each = local.roles

  project     = var.project
  role_id     = "${var.role_id_prefix}.${each.key}"
  title       = "cloudckpt ${each.key}"
  description = "What cloudckpt does as a ${each.key}; bound with a condition on the prefix."
  permissions = local.permissions[each.key].prefix
}

# Unfinished uploads are listed by bucket, and no condition can confine that to a prefix.
resource "google_project_iam_custom_role" "uploads" {
  project     = var.project
  role_id     = "${var.role_id_prefix}.uploads"
  title       = "cloudckpt: list unfinished uploads"
  description = "Find the uploads that a killed process left; shows their names in the whole bucket."
  permissions = local.permissions["trainer"].bucket
}

resource "google_storage_bucket_iam_member" "this" {
  for_each = local.members

  bucket = google_storage_bucket.this.name
  role   = google_project_iam_custom_role.this[each.value.role].id
  member = each.value.member

  condition {
    title       = "only under the prefix"
    description = "Objects and listings of other prefixes are none of its business."
    expression  = local.under_the_prefix
  }

  lifecycle {
    precondition {
      condition     = !startswith(each.key, "${each.value.role}:gke:") || var.project_number != null
      error_message = "A Kubernetes service account is named by the project's number: set project_number."
    }
  }
}

resource "google_storage_bucket_iam_member" "uploads" {
  for_each = { for key, value in local.members : key => value if length(local.permissions[value.role].bucket) > 0 }

  bucket = google_storage_bucket.this.name
  role   = google_project_iam_custom_role.uploads.id
  member = each.value.member
}
