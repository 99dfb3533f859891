variable "bucket_name" {
  description = "Name of the bucket that is made."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "Use 3 to 63 lower-case letters, digits and hyphens; a dot would break the certificate's host name."
  }
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

variable "kms_key_arn" {
  description = "ARN of a KMS key of your own to encrypt with; null for keys that S3 manages (SSE-S3)."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:[a-z-]+:kms:", var.kms_key_arn))
    error_message = "Give the key's ARN, not its id or alias: policies name it."
  }
}

variable "versioning" {
  description = "Keep what was overwritten or deleted for recovery_days. Off: a manifest that somebody overwrites is gone."
  type        = bool
  default     = true
}

variable "recovery_days" {
  description = "Days for which old versions stay, and are paid for: of large objects (data, which churns) and of small ones (manifest)."
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

variable "abort_multipart_days" {
  description = "Days after which the parts of an unfinished upload are deleted. No listing shows them, and they are paid for."
  type        = number
  default     = 3

  validation {
    condition     = var.abort_multipart_days >= 2
    error_message = "At least 2: a slow upload must not be aborted under its writer."
  }
}

variable "enforce_conditional_manifest" {
  description = "Refuse a PUT of manifest.json that has no If-Match or If-None-Match, whoever sends it. Copies into the bucket cannot overwrite a manifest then."
  type        = bool
  default     = true
}

variable "trainer" {
  description = "Who may take the trainer's role: EC2 instances, Kubernetes service accounts by EKS Pod Identity or by IRSA, other principals. None: only the policy is made."
  type = object({
    ec2 = optional(bool, false)
    eks_pod_identity = optional(list(object({
      cluster_name    = string
      namespace       = string
      service_account = string
    })), [])
    irsa = optional(list(object({
      oidc_provider_arn = string
      namespace         = string
      service_account   = string
    })), [])
    principals = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for i in var.trainer.irsa : !strcontains("${i.namespace}${i.service_account}", "*")])
    error_message = "Name each service account: a wildcard would let any pod of the cluster train."
  }

  validation {
    condition     = alltrue([for i in var.trainer.irsa : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:oidc-provider/.", i.oidc_provider_arn))])
    error_message = "Give the ARN of the cluster's OIDC provider: arn:aws:iam::ACCOUNT:oidc-provider/…."
  }

  validation {
    condition     = alltrue([for p in var.trainer.principals : can(regex("^([0-9]{12}|arn:[a-z-]+:(iam|sts)::[0-9]{12}:[^*]+)$", p))])
    error_message = "Name each principal, by ARN or account number: a wildcard would trust everybody."
  }
}

variable "reader" {
  description = "Who may take the reader's role, as for trainer."
  type = object({
    ec2 = optional(bool, false)
    eks_pod_identity = optional(list(object({
      cluster_name    = string
      namespace       = string
      service_account = string
    })), [])
    irsa = optional(list(object({
      oidc_provider_arn = string
      namespace         = string
      service_account   = string
    })), [])
    principals = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for i in var.reader.irsa : !strcontains("${i.namespace}${i.service_account}", "*")])
    error_message = "Name each service account: a wildcard would let any pod of the cluster read."
  }

  validation {
    condition     = alltrue([for i in var.reader.irsa : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:oidc-provider/.", i.oidc_provider_arn))])
    error_message = "Give the ARN of the cluster's OIDC provider: arn:aws:iam::ACCOUNT:oidc-provider/…."
  }

  validation {
    condition     = alltrue([for p in var.reader.principals : can(regex("^([0-9]{12}|arn:[a-z-]+:(iam|sts)::[0-9]{12}:[^*]+)$", p))])
    error_message = "Name each principal, by ARN or account number: a wildcard would trust everybody."
  }
}

variable "sweeper" {
  description = "Who may take the sweeper's role, as for trainer."
  type = object({
    ec2 = optional(bool, false)
    eks_pod_identity = optional(list(object({
      cluster_name    = string
      namespace       = string
      service_account = string
    })), [])
    irsa = optional(list(object({
      oidc_provider_arn = string
      namespace         = string
      service_account   = string
    })), [])
    principals = optional(list(string), [])
  })
  default = {}

  validation {
    condition     = alltrue([for i in var.sweeper.irsa : !strcontains("${i.namespace}${i.service_account}", "*")])
    error_message = "Name each service account: a wildcard would let any pod of the cluster delete."
  }

  validation {
    condition     = alltrue([for i in var.sweeper.irsa : can(regex("^arn:[a-z-]+:iam::[0-9]{12}:oidc-provider/.", i.oidc_provider_arn))])
    error_message = "Give the ARN of the cluster's OIDC provider: arn:aws:iam::ACCOUNT:oidc-provider/…."
  }

  validation {
    condition     = alltrue([for p in var.sweeper.principals : can(regex("^([0-9]{12}|arn:[a-z-]+:(iam|sts)::[0-9]{12}:[^*]+)$", p))])
    error_message = "Name each principal, by ARN or account number: a wildcard would trust everybody."
  }
}

variable "gateway_endpoint" {
  description = "Route S3 past the NAT gateway, which costs nothing: the VPC, its region, and the route tables to add to. Null: none is made."
  type = object({
    vpc_id          = string
    region          = string
    route_table_ids = list(string)
  })
  default = null
}

variable "access_logs" {
  description = "A bucket that takes this one's access logs, and the prefix there. Null: no logs."
  type = object({
    bucket = string
    prefix = optional(string, "s3-access/")
  })
  default = null
}

variable "tags" {
  description = "Tags for everything that is made."
  type        = map(string)
  default     = {}
}
