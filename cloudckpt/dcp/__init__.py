"""The store behind PyTorch's own distributed checkpoint (``torch.distributed.checkpoint``, DCP), without a manager.

    dcp.save(state, storage_writer=cloudckpt.dcp.StorageWriter("s3://bucket/run", step=500, metrics={"loss": 0.3}))
    dcp.load(state, storage_reader=cloudckpt.dcp.StorageReader("s3://bucket/run", select="latest"))

DCP plans, and brings the ranks together over its process group. What is written is a checkpoint like any other:
announced before its first byte, committed after its last, kept by the run's policy; and what a ``CheckpointManager``
wrote on any number of ranks can be read.
"""

from __future__ import annotations

from cloudckpt.dcp.reading import StorageReader
from cloudckpt.dcp.writing import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
