"""The S3 connector for PyTorch (s3torchconnector): its checkpoint object and its DCP storage."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.cases.base import Place, case, peer
from benchmarks.state import State

__all__ = ["dcp_writer"]

#: As Any: it exports names without saying so.
dcp: Any = peer("torch.distributed.checkpoint")

_REGION = "us-east-1"


def _config() -> Any:
    return peer("s3torchconnector").S3ClientConfig(force_path_style=True)


def dcp_writer(place: Place, **options: Any) -> Any:
    """Its storage writer; the endpoint comes from the environment, there is no argument for it."""
    return peer("s3torchconnector.dcp").S3StorageWriter(
        region=_REGION, path=f"s3://{place.path}/", s3client_config=_config(), overwrite=True, **options
    )


def _checkpoint() -> Any:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return peer("s3torchconnector").S3Checkpoint(region=_REGION, endpoint=endpoint, s3client_config=_config())


@case("save-s3", "peer")
def s3torchconnector(state: State, place: Place) -> None:
    """torch.save into its writer."""
    with _checkpoint().writer(f"s3://{place.path}") as writer:
        torch.save(state, writer)


@case("save-s3", "peer")
def s3torchconnector_dcp(state: State, place: Place) -> None:
    """DCP through its storage writer."""
    dcp.save(state, storage_writer=dcp_writer(place), no_dist=True)


@case("load-s3", "peer", name="s3torchconnector")
def _load(state: State, place: Place) -> State:
    """torch.load from its reader."""
    with _checkpoint().reader(f"s3://{place.path}/pt") as reader:
        found: State = torch.load(reader, weights_only=True)
    return found


@case("load-s3", "peer", name="s3torchconnector_dcp")
def _load_dcp(state: State, place: Place) -> None:
    """DCP through its storage reader, into the caller's tensors."""
    reader = peer("s3torchconnector.dcp").S3StorageReader(
        region=_REGION, path=f"s3://{place.path}/dcp/", s3client_config=_config()
    )
    dcp.load(state, storage_reader=reader, no_dist=True)
