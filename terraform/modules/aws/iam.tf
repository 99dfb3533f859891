# Who may do what. The documents come from policies/, which tools/generate_terraform.py makes from the table in
# cloudckpt/core/rights.py: change a right there.

locals {
  roles = toset(["trainer", "reader", "sweeper"])
  who   = { trainer = var.trainer, reader = var.reader, sweeper = var.sweeper }

  filled_in = {
    bucket_arn  = local.bucket_arn
    key_prefix  = local.key_prefix
    kms_key_arn = var.kms_key_arn == null ? "" : var.kms_key_arn
  }

  guard = jsonencode({
    Version = "2012-10-17"
    Statement = [
      for s in jsondecode(templatefile("${path.module}/policies/guard.json", local.filled_in)).Statement : s
      if s.Sid != "ManifestOnlyConditionally" || var.enforce_conditional_manifest
    ]
  })

  policies = {
    for role in local.roles : role => jsonencode({
      Version = "2012-10-17"
      Statement = concat(
        jsondecode(templatefile("${path.module}/policies/${role}.json", local.filled_in)).Statement,
        [
          for s in jsondecode(templatefile("${path.module}/policies/${role}-key.json", local.filled_in)).Statement : s
          if var.kms_key_arn != null
        ],
      )
    })
  }

  # Lists by "for … if" and not by "? :", whose two sides would have to be of one type.
  trust = {
    for role, who in local.who : role => concat(
      [
        for wanted in [who.ec2] : {
          Effect    = "Allow"
          Principal = { Service = "ec2.amazonaws.com" }
          Action    = "sts:AssumeRole"
        } if wanted
      ],
      [
        for wanted in [length(who.eks_pod_identity) > 0] : {
          Effect    = "Allow"
          Principal = { Service = "pods.eks.amazonaws.com" }
          Action    = ["sts:AssumeRole", "sts:TagSession"]
        } if wanted
      ],
      [
        for wanted in [length(who.principals) > 0] : {
          Effect    = "Allow"
          Principal = { AWS = who.principals }
          Action    = "sts:AssumeRole"
        } if wanted
      ],
      [
        for i in who.irsa : {
          Effect    = "Allow"
          Principal = { Federated = i.oidc_provider_arn }
          Action    = "sts:AssumeRoleWithWebIdentity"
          Condition = {
            StringEquals = {
              "${split("oidc-provider/", i.oidc_provider_arn)[1]}:aud" = "sts.amazonaws.com"
              "${split("oidc-provider/", i.oidc_provider_arn)[1]}:sub" = "system:serviceaccount:${i.namespace}:${i.service_account}"
            }
          }
        }
      ],
    )
  }

  trusted = toset([for role in local.roles : role if length(local.trust[role]) > 0])

  pods = merge([
    for role, who in local.who : {
      for pod in who.eks_pod_identity : "${role}/${pod.cluster_name}/${pod.namespace}/${pod.service_account}" => merge(pod, { role = role })
    }
  ]...)
}

resource "aws_iam_policy" "this" {
  for_each = local.roles

  name_prefix = "ckpt-${each.key}-"
  description = "cloudckpt ${each.key} on ${local.root}"
  policy      = local.policies[each.key]
  tags        = var.tags
}

resource "aws_iam_role" "this" {
  for_each = local.trusted

  name_prefix        = "ckpt-${each.key}-"
  description        = "cloudckpt ${each.key} on ${local.root}"
  assume_role_policy = jsonencode({ Version = "2012-10-17", Statement = local.trust[each.key] })
  tags               = var.tags
}

resource "aws_iam_role_policy_attachment" "this" {
  for_each = local.trusted

  role       = aws_iam_role.this[each.key].name
  policy_arn = aws_iam_policy.this[each.key].arn
}

resource "aws_iam_instance_profile" "this" {
  for_each = toset([for role, who in local.who : role if who.ec2])

  name_prefix = "ckpt-${each.key}-"
  role        = aws_iam_role.this[each.key].name
  tags        = var.tags
}

resource "aws_eks_pod_identity_association" "this" {
  for_each = local.pods

  cluster_name    = each.value.cluster_name
  namespace       = each.value.namespace
  service_account = each.value.service_account
  role_arn        = aws_iam_role.this[each.value.role].arn
  tags            = var.tags
}
