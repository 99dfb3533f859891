# The bucket and its guard rails. Who may use it is in iam.tf.

data "aws_partition" "current" {}

locals {
  # Written out instead of asked of the bucket, so that the policies can be read in a plan.
  bucket_arn = "arn:${data.aws_partition.current.partition}:s3:::${var.bucket_name}"
  key_prefix = var.prefix == "" ? "" : "${var.prefix}/"
  root       = var.prefix == "" ? "s3://${var.bucket_name}" : "s3://${var.bucket_name}/${var.prefix}"

  # A manifest is far smaller, a payload object usually far larger: old versions of both are kept for different times.
  small_object_bytes = 1048576
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_144:Checkpoints can be made again; a copy in another region is a decision about money, not a default
  #checkov:skip=CKV2_AWS_62:Nobody waits for an event of each object; the manifest says what happened
  #checkov:skip=CKV_AWS_18:Access logs are a variable; they need a bucket that this module must not choose
  #checkov:skip=CKV_AWS_145:S3 encrypts with its own keys, which cost nothing; a KMS key is a variable for whoever must hold it
  bucket        = var.bucket_name
  force_destroy = false
  tags          = var.tags
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id

  versioning_configuration {
    status = var.versioning ? "Enabled" : "Suspended"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    # One request to KMS for many objects instead of one for each.
    bucket_key_enabled = var.kms_key_arn != null

    apply_server_side_encryption_by_default {
      sse_algorithm     = var.kms_key_arn == null ? "AES256" : "aws:kms"
      kms_master_key_id = var.kms_key_arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "abort-unfinished-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = var.abort_multipart_days
    }
  }

  rule {
    id     = "expire-old-versions-of-data"
    status = "Enabled"

    filter {
      object_size_greater_than = local.small_object_bytes
    }

    noncurrent_version_expiration {
      noncurrent_days = var.recovery_days.data
    }
  }

  rule {
    id     = "expire-old-versions-of-manifests"
    status = "Enabled"

    filter {
      object_size_less_than = local.small_object_bytes + 1
    }

    # By days alone. With newer_noncurrent_versions a version would also wait for that many newer ones, and no key but
    # the manifest's is ever written twice: the index of a deleted checkpoint would stay for good, with its delete marker.
    noncurrent_version_expiration {
      noncurrent_days = var.recovery_days.manifest
    }
  }

  rule {
    id     = "forget-delete-markers"
    status = "Enabled"

    filter {}

    # A marker that hides nothing any more.
    expiration {
      expired_object_delete_marker = true
    }

    # A delete that is sent twice leaves a marker over a marker. The lower one is an old version without a size, which
    # the filters above may or may not take. Where rules overlap the shorter time holds, so theirs stay as they are.
    noncurrent_version_expiration {
      noncurrent_days = max(var.recovery_days.data, var.recovery_days.manifest)
    }
  }

  depends_on = [aws_s3_bucket_versioning.this]

  lifecycle {
    # A check block would only warn. What is live is decided by the manifest and by nothing else: a rule by age deletes
    # the best checkpoint of a run that has not improved for a while.
    postcondition {
      condition     = alltrue(flatten([for r in self.rule : [for e in r.expiration : coalesce(e.days, 0) == 0 && e.date == null]]))
      error_message = "A lifecycle rule would delete live checkpoints by their age."
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  bucket = aws_s3_bucket.this.id
  policy = local.guard

  # S3 answers "conflicting operation" to whoever changes both at once.
  depends_on = [aws_s3_bucket_public_access_block.this, aws_s3_bucket_ownership_controls.this]
}

resource "aws_s3_bucket_logging" "this" {
  count = var.access_logs == null ? 0 : 1

  bucket        = aws_s3_bucket.this.id
  target_bucket = var.access_logs.bucket
  target_prefix = var.access_logs.prefix
}

resource "aws_vpc_endpoint" "s3" {
  count = var.gateway_endpoint == null ? 0 : 1

  vpc_id            = var.gateway_endpoint.vpc_id
  service_name      = "com.amazonaws.${var.gateway_endpoint.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.gateway_endpoint.route_table_ids
  tags              = var.tags
}
