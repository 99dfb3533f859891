# A training job on one EC2 spot instance that comes back by itself, and a bucket for its checkpoints.

terraform {
  required_version = ">= 1.6"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.0, < 7.0"
    }
  }
}

provider "aws" {
  region = var.region
}

module "checkpoints" {
  source = "../../modules/aws"

  bucket_name = var.bucket_name
  prefix      = "runs"
  trainer     = { ec2 = true }
  reader      = { principals = var.readers }

  gateway_endpoint = {
    vpc_id          = var.vpc_id
    region          = var.region
    route_table_ids = var.route_table_ids
  }
}

resource "aws_launch_template" "trainer" {
  #checkov:skip=CKV_AWS_341:A training container asks for the credentials of the role through one hop more
  name_prefix   = "ckpt-trainer-"
  image_id      = var.image_id
  instance_type = var.instance_type

  iam_instance_profile {
    name = module.checkpoints.instance_profiles["trainer"]
  }

  instance_market_options {
    market_type = "spot"
  }

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
    # A container asks through one more hop.
    http_put_response_hop_limit = 2
  }

  user_data = base64encode(templatefile("${path.module}/start.sh.tftpl", {
    environment = module.checkpoints.environment
    run         = var.run
    command     = var.command
  }))
}

# One instance. When the spot market takes it, the next one starts the same command: the run's claim fences whatever is
# left of the old one, and restore() goes on from the last commit.
resource "aws_autoscaling_group" "trainer" {
  name_prefix         = "ckpt-trainer-"
  min_size            = 0
  max_size            = 1
  desired_capacity    = 1
  capacity_rebalance  = false
  vpc_zone_identifier = var.subnet_ids

  launch_template {
    id      = aws_launch_template.trainer.id
    version = aws_launch_template.trainer.latest_version
  }

  tag {
    key                 = "Name"
    value               = "ckpt-trainer-${var.run}"
    propagate_at_launch = true
  }
}
