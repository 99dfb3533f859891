# Run with mocks: no account, no credentials. `terraform test`, or `make terraform` at the repository's root.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = {
      partition = "aws"
    }
  }
}

variables {
  bucket_name = "ckpt-test"
  prefix      = "team/runs"
}

run "defaults" {
  command = apply

  assert {
    condition     = alltrue(flatten([for r in aws_s3_bucket_lifecycle_configuration.this.rule : [for e in r.expiration : coalesce(e.days, 0) == 0 && e.date == null]]))
    error_message = "A rule expires live checkpoints."
  }

  assert {
    condition     = alltrue(flatten([for r in aws_s3_bucket_lifecycle_configuration.this.rule : [for n in r.noncurrent_version_expiration : coalesce(n.newer_noncurrent_versions, 0) == 0]]))
    error_message = "An old version waits for newer ones, which a key that is written once never has."
  }

  assert {
    condition     = anytrue([for r in aws_s3_bucket_lifecycle_configuration.this.rule : anytrue([for e in r.expiration : e.expired_object_delete_marker]) && alltrue([for f in r.filter : coalesce(f.object_size_greater_than, 0) == 0 && coalesce(f.object_size_less_than, 0) == 0])])
    error_message = "Delete markers that hide nothing stay."
  }

  assert {
    condition     = anytrue(flatten([for r in aws_s3_bucket_lifecycle_configuration.this.rule : [for a in r.abort_incomplete_multipart_upload : a.days_after_initiation == 3]]))
    error_message = "Unfinished uploads are not cleaned up."
  }

  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.this.block_public_acls,
      aws_s3_bucket_public_access_block.this.block_public_policy,
      aws_s3_bucket_public_access_block.this.ignore_public_acls,
      aws_s3_bucket_public_access_block.this.restrict_public_buckets,
    ])
    error_message = "The bucket can be made public."
  }

  assert {
    condition     = aws_s3_bucket_ownership_controls.this.rule[0].object_ownership == "BucketOwnerEnforced" && !aws_s3_bucket.this.force_destroy
    error_message = "Somebody else can own objects, or destroy takes them along."
  }

  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "Versions are not kept."
  }

  assert {
    condition     = [for s in jsondecode(aws_s3_bucket_policy.this.policy).Statement : s.Sid] == ["OnlyOverTls", "NoOldTls", "ManifestOnlyConditionally"]
    error_message = "The guard rails are not those of policies/guard.json."
  }

  assert {
    condition = alltrue(flatten([
      for role, policy in aws_iam_policy.this : [
        for s in jsondecode(policy.policy).Statement : s.Effect == "Deny" || !contains(s.Action, "s3:*") && !contains(s.Action, "s3:DeleteObjectVersion")
      ]
    ]))
    error_message = "A role is too strong."
  }

  assert {
    condition     = alltrue([for s in jsondecode(aws_iam_policy.this["reader"].policy).Statement : alltrue([for a in s.Action : can(regex("^s3:(Get|List)", a))])])
    error_message = "The reader can write."
  }

  assert {
    condition     = length(aws_iam_role.this) == 0 && length(aws_iam_instance_profile.this) == 0
    error_message = "Roles are made for nobody."
  }

  assert {
    condition     = output.cloudckpt_root == "s3://ckpt-test/team/runs" && output.environment["CLOUDCKPT_ROOT"] == "s3://ckpt-test/team/runs"
    error_message = "The outputs do not lead to the runs."
  }
}

run "own_key" {
  command = apply

  variables {
    kms_key_arn = "arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-0000-0000-000000000000"
  }

  assert {
    condition     = contains(flatten([for s in jsondecode(aws_iam_policy.this["trainer"].policy).Statement : s.Action]), "kms:GenerateDataKey")
    error_message = "The trainer cannot encrypt."
  }

  assert {
    condition     = !contains(flatten([for s in jsondecode(aws_iam_policy.this["reader"].policy).Statement : s.Action]), "kms:GenerateDataKey")
    error_message = "The reader may encrypt, which it does not need."
  }
}

run "who" {
  command = apply

  variables {
    trainer = {
      ec2 = true
      irsa = [{
        oidc_provider_arn = "arn:aws:iam::111122223333:oidc-provider/oidc.eks.eu-west-1.amazonaws.com/id/ABC"
        namespace         = "train"
        service_account   = "trainer"
      }]
    }
    reader = {
      eks_pod_identity = [{ cluster_name = "c", namespace = "serve", service_account = "server" }]
    }
    sweeper = {
      principals = ["arn:aws:iam::111122223333:role/ops"]
    }
  }

  assert {
    condition     = jsondecode(aws_iam_role.this["trainer"].assume_role_policy).Statement[1].Condition.StringEquals["oidc.eks.eu-west-1.amazonaws.com/id/ABC:sub"] == "system:serviceaccount:train:trainer"
    error_message = "IRSA trusts another service account."
  }

  assert {
    condition     = jsondecode(aws_iam_role.this["trainer"].assume_role_policy).Statement[1].Condition.StringEquals["oidc.eks.eu-west-1.amazonaws.com/id/ABC:aud"] == "sts.amazonaws.com"
    error_message = "IRSA takes tokens that are meant for somebody else."
  }

  assert {
    condition     = aws_eks_pod_identity_association.this["reader/c/serve/server"].namespace == "serve" && length(aws_iam_instance_profile.this) == 1
    error_message = "Pod Identity or the instance profile is missing."
  }

  assert {
    condition     = jsondecode(aws_iam_role.this["sweeper"].assume_role_policy).Statement[0].Principal.AWS[0] == "arn:aws:iam::111122223333:role/ops"
    error_message = "The sweeper trusts somebody else."
  }
}

run "logs_and_endpoint" {
  command = apply

  variables {
    access_logs = { bucket = "ckpt-logs" }
    gateway_endpoint = {
      vpc_id          = "vpc-1"
      region          = "eu-west-1"
      route_table_ids = ["rtb-1"]
    }
  }

  assert {
    condition     = aws_s3_bucket_logging.this[0].target_bucket == "ckpt-logs" && aws_s3_bucket_logging.this[0].target_prefix == "s3-access/"
    error_message = "Access logs go somewhere else."
  }

  assert {
    condition     = aws_vpc_endpoint.s3[0].service_name == "com.amazonaws.eu-west-1.s3" && aws_vpc_endpoint.s3[0].vpc_endpoint_type == "Gateway"
    error_message = "The endpoint is not the one that costs nothing."
  }
}

run "whole_bucket" {
  command = plan

  variables {
    prefix = ""
  }

  assert {
    condition     = output.cloudckpt_root == "s3://ckpt-test" && strcontains(aws_iam_policy.this["reader"].policy, "arn:aws:s3:::ckpt-test/*")
    error_message = "Without a prefix the roles must reach the whole bucket."
  }
}

run "without_the_manifest_rule" {
  command = plan

  variables {
    enforce_conditional_manifest = false
  }

  assert {
    condition     = [for s in jsondecode(aws_s3_bucket_policy.this.policy).Statement : s.Sid] == ["OnlyOverTls", "NoOldTls"]
    error_message = "The rule is still there, or another one is gone."
  }
}

run "a_wildcard_in_the_prefix_is_refused" {
  command = plan

  variables {
    prefix = "team/*"
  }

  expect_failures = [var.prefix]
}

run "a_wildcard_for_a_service_account_is_refused" {
  command = plan

  variables {
    trainer = {
      irsa = [{
        oidc_provider_arn = "arn:aws:iam::111122223333:oidc-provider/oidc.eks.eu-west-1.amazonaws.com/id/ABC"
        namespace         = "train"
        service_account   = "*"
      }]
    }
  }

  expect_failures = [var.trainer]
}

run "an_oidc_provider_is_given_by_its_arn" {
  command = plan

  variables {
    trainer = {
      irsa = [{
        oidc_provider_arn = "https://oidc.eks.eu-west-1.amazonaws.com/id/ABC"
        namespace         = "train"
        service_account   = "trainer"
      }]
    }
  }

  expect_failures = [var.trainer]
}

run "a_day_is_too_soon_to_abort_uploads" {
  command = plan

  variables {
    abort_multipart_days = 1
  }

  expect_failures = [var.abort_multipart_days]
}

run "everybody_is_no_principal" {
  command = plan

  variables {
    trainer = { principals = ["*"] }
    reader  = { principals = ["arn:aws:iam::111122223333:role/*"] }
    sweeper = { principals = ["arn:aws:iam::*:role/ops"] }
  }

  expect_failures = [var.trainer, var.reader, var.sweeper]
}
