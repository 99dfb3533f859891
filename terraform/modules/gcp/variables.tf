variable "project" {
  description = "The project that the bucket, the roles and the service accounts are made in."
  type        = string
}

variable "project_number" {
  description = "The project's number, which names its workload identity pool. Needed with a gke list."
  type        = string
  default     = null
}

variable "bucket_name" {
  description = "Name of the bucket that is made."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "Use 3 to 63 lower-case letters, digits, hyphens and underscores; a dot would need a domain that is yours."
  }
}

variable "location" {
  description = "The bucket's location: the region that trains, since data that leaves a region is paid for."
  type        = string
}

variable "prefix" {
  description = "Where runs lie in the bucket, without slashes around it; the roles are confined to it. Empty: the whole bucket."
  type        = string
  default     = "runs"

  validation {
    condition     = can(regex("^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$", var.prefix)) && !can(regex("(^|/)[.]{1,2}(/|$)", var.prefix))
    error_message = "Use letters, digits, dots, hyphens and underscores, parts joined by single slashes: no wildcard, no '..'."
  }
}

variable "kms_key" {
  description = "A Cloud KMS key of your own to encrypt with, by its id (projects/…/cryptoKeys/…), which may be made in the same plan; null for keys that Google manages."
  type = object({
    id = string
  })
  default = null
}

variable "versioning" {
  description = "Keep what was overwritten or deleted for recovery_days. At Google a trainer that replaces a manifest may delete it as well: this is the way back."
  type        = bool
  default     = true
}

variable "recovery_days" {
  description = "Days for which old versions stay, and are paid for: of payload (data, which churns) and of manifests and indexes (manifest); of anything else the longer of the two."
  type = object({
    data     = optional(number, 1)
    manifest = optional(number, 30)
  })
  default = {}

  validation {
    condition     = var.recovery_days.data >= 1 && var.recovery_days.manifest >= 1
    error_message = "At least 1 day each; versioning = false keeps nothing."
  }
}

variable "soft_delete_days" {
  description = "Days for which deleted objects can be restored, and are paid for, payload included: 0 (none) or 7 to 90. Google's own default is 7, which bills every retired checkpoint for a week."
  type        = number
  default     = 0

  validation {
    condition     = var.soft_delete_days == 0 || (var.soft_delete_days >= 7 && var.soft_delete_days <= 90)
    error_message = "0 (off), or 7 to 90."
  }
}

variable "abort_multipart_days" {
  description = "Days after which the parts of an unfinished upload are deleted. No listing shows them, and they are paid for."
  type        = number
  default     = 3

  validation {
    condition     = var.abort_multipart_days >= 2
    error_message = "At least 2: a slow upload must not be aborted under its writer."
  }
}

variable "role_id_prefix" {
  description = "What the ids of custom roles and service accounts begin with: another one for each bucket of a project. A role's id that was deleted cannot be used again for weeks."
  type        = string
  default     = "cloudckpt"

  validation {
    condition     = can(regex("^[a-zA-Z][a-zA-Z0-9_.]{2,39}$", var.role_id_prefix))
    error_message = "Use 3 to 40 letters, digits, underscores and dots, a letter first."
  }
}

variable "trainer" {
  description = "Who has the trainer's role: a service account that is made for it, Kubernetes service accounts (namespace/name) by Workload Identity Federation for GKE, other members as IAM spells them."
  type = object({
    service_account = optional(bool, false)
    gke             = optional(list(string), [])
    members         = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for name in var.trainer.gke : can(regex("^[a-z0-9-]+/[a-z0-9.-]+$", name))])
    error_message = "Write a Kubernetes service account as namespace/name."
  }

  validation {
    condition     = alltrue([for m in var.trainer.members : !contains(["allUsers", "allAuthenticatedUsers"], m)])
    error_message = "Name each member: a run is nothing for everybody."
  }
}

variable "reader" {
  description = "Who has the reader's role, as for trainer."
  type = object({
    service_account = optional(bool, false)
    gke             = optional(list(string), [])
    members         = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for name in var.reader.gke : can(regex("^[a-z0-9-]+/[a-z0-9.-]+$", name))])
    error_message = "Write a Kubernetes service account as namespace/name."
  }

  validation {
    condition     = alltrue([for m in var.reader.members : !contains(["allUsers", "allAuthenticatedUsers"], m)])
    error_message = "Name each member: a run is nothing for everybody."
  }
}

variable "sweeper" {
  description = "Who has the sweeper's role, as for trainer."
  type = object({
    service_account = optional(bool, false)
    gke             = optional(list(string), [])
    members         = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for name in var.sweeper.gke : can(regex("^[a-z0-9-]+/[a-z0-9.-]+$", name))])
    error_message = "Write a Kubernetes service account as namespace/name."
  }

  validation {
    condition     = alltrue([for m in var.sweeper.members : !contains(["allUsers", "allAuthenticatedUsers"], m)])
    error_message = "Name each member: a run is nothing for everybody."
  }
}

variable "labels" {
  description = "Labels for the bucket."
  type        = map(string)
  default     = {}
}
