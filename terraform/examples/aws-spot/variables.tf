variable "region" {
  description = "The region of bucket and instance."
  type        = string
}

variable "bucket_name" {
  description = "Name of the bucket that is made."
  type        = string
}

variable "run" {
  description = "Name of the run: its folder under the root."
  type        = string
  default     = "demo"
}

variable "command" {
  description = "What trains, in a shell. It finds the run's root in CLOUDCKPT_ROOT."
  type        = string
  default     = "python train.py"
}

variable "image_id" {
  description = "An AMI with Python, PyTorch and cloudckpt[s3]."
  type        = string
}

variable "instance_type" {
  description = "The instance's type."
  type        = string
  default     = "g6.xlarge"
}

variable "vpc_id" {
  description = "The VPC, for the gateway endpoint of S3."
  type        = string
}

variable "route_table_ids" {
  description = "The route tables of the subnets, for the same."
  type        = list(string)
}

variable "subnet_ids" {
  description = "Subnets that the instance may start in; more zones find spot capacity more often."
  type        = list(string)
}

variable "readers" {
  description = "ARNs of principals that may read checkpoints: evaluators, people."
  type        = list(string)
  default     = []
}
