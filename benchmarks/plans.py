"""What is measured: for each results file its cases, sizes, distance of the server, and rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["BARS", "LINKS", "PLANS", "Link", "Plan", "quick"]

#: Interleaved pairs behind every bar: with 11, the 9th smallest ratio is the upper 95 % bound of the median.
PAIRS = 11
#: Where two short cases swing from round to round: of 31, the 21st is the bound, and nearer to the median.
_MANY_PAIRS = 31
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Link:
    """How far the S3 server is. ``server`` is "sink" or "seaweedfs"."""

    server: str = "sink"
    tls: bool = False
    delay_ms: float = 0.0
    connection_mb_per_s: float = 0.0
    said: str = "the sink beside us, plain HTTP"


LINKS = {
    "plain": Link(),
    "tls": Link(tls=True, said="the sink beside us, TLS"),
    "far": Link(delay_ms=20, connection_mb_per_s=85, said="a far store: 20 ms to the first byte, 85 MB/s a connection"),
    "seaweedfs": Link(server="seaweedfs", said="SeaweedFS beside us, a real store"),
    "disk": Link(server="", said="local disk"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One results file.

    Attributes:
        name: the file's name, and the command that makes it.
        group: which table of cases.
        link: how far the server is.
        sizes: states to run at.
        cases: which cases; all of the group when empty.
        rounds: each runs every case of every size once, in turn.
        timeout_s: of one case; what takes longer is written down as that.
        processes: how many processes save together; 0 is one, without waiting for others.
    """

    name: str
    group: str
    link: str
    sizes: tuple[str, ...] = ("45m",)
    cases: tuple[str, ...] = ()
    rounds: int = _ROUNDS
    timeout_s: float = 240.0
    processes: tuple[int, ...] = (0,)


def _plans(*plans: Plan) -> dict[str, Plan]:
    return {plan.name: plan for plan in plans}


_GROWN = ("bytes-10", "bytes-64", "bytes-256", "bytes-1024", "bytes-4096", "bytes-8192")
_COUNTS = tuple(f"tensors-{count}" for count in (10, 100, 1000, 10_000, 100_000))

PLANS = _plans(
    Plan("save-local", "save-local", "disk"),
    Plan(
        "save-local-2g", "save-local", "disk", ("180m",),
        ("memcpy", "write", "write_fsync", "write_o_direct", "cloudckpt", "torch_save_fsync", "safetensors_fsync",
         "dcp_default"),
    ),
    Plan("save-s3", "save-s3", "plain"),
    Plan(
        "save-s3-2g", "save-s3", "plain", ("180m",),
        ("socket_1", "socket_4", "cloudckpt", "obstore_views", "dcp_fsspec", "s3fs_pipe", "awscrt_put",
         "s3torchconnector_dcp"),
    ),
    Plan(
        "save-s3-tls", "save-s3", "tls", ("45m",),
        ("socket_1", "cloudckpt", "obstore_views", "dcp_fsspec", "s3fs_pipe", "boto3_upload", "awscrt_put",
         "s3torchconnector", "s3torchconnector_dcp"),
    ),
    Plan(
        "save-s3-far", "save-s3", "far", ("45m",),
        ("socket_1", "socket_16", "cloudckpt", "obstore_views", "dcp_fsspec", "s3fs_pipe", "lightning", "boto3_upload",
         "obstore_put", "awscrt_put", "s3torchconnector", "s3torchconnector_dcp"),
    ),
    Plan(
        "save-s3-seaweedfs", "save-s3", "seaweedfs", ("45m",),
        ("socket_1", "socket_4", "cloudckpt", "dcp_fsspec", "s3fs_pipe", "boto3_upload", "s3torchconnector_dcp"),
    ),
    Plan("load-local", "load-local", "disk"),
    Plan("load-s3", "load-s3", "plain"),
    Plan(
        "load-s3-tls", "load-s3", "tls", ("45m",),
        ("socket_1", "cloudckpt_restore", "cloudckpt_load", "dcp_fsspec", "s3fs_cat", "boto3_download", "awscrt_get",
         "s3torchconnector_dcp"),
    ),
    Plan(
        "load-s3-far", "load-s3", "far", ("45m",),
        ("socket_1", "socket_16", "cloudckpt_restore", "cloudckpt_load", "dcp_fsspec", "s3fs_cat", "boto3_download",
         "awscrt_get", "s3torchconnector_dcp"),
    ),
    Plan(
        "load-s3-seaweedfs", "load-s3", "seaweedfs", ("45m",),
        ("socket_1", "socket_4", "cloudckpt_restore", "dcp_fsspec", "s3fs_cat", "boto3_download",
         "s3torchconnector_dcp"),
    ),
    Plan("lanes-up", "save-lanes", "plain"),
    Plan("lanes-up-tls", "save-lanes", "tls"),
    Plan("lanes-down", "load-lanes", "plain"),
    Plan("lanes-down-tls", "load-lanes", "tls"),
    Plan("stall-local", "stall-local", "disk"),
    Plan("stall-s3", "stall-s3", "plain"),
    Plan("grow-size", "save-s3", "plain", _GROWN, ("socket_1", "cloudckpt", "s3torchconnector_dcp")),
    Plan("grow-load", "load-s3", "plain", _GROWN[:4], ("socket_1", "cloudckpt_restore", "s3torchconnector_dcp")),
    Plan("grow-tensors", "save-s3", "plain", _COUNTS, ("socket_1", "cloudckpt", "dcp_fsspec")),
    Plan("grow-load-tensors", "load-s3", "plain", _COUNTS, ("socket_1", "cloudckpt_restore", "dcp_fsspec")),
    Plan(
        "grow-processes", "save-s3", "plain", ("bytes-256",), ("socket_1", "cloudckpt", "s3torchconnector_dcp"),
        processes=(1, 2, 4, 8),
    ),
    Plan("discover", "discover", "plain", ("10", "1000", "10000"), rounds=3),
    Plan("discover-far", "discover", "far", ("10", "1000"), rounds=1),
)  # fmt: skip

BARS = _plans(
    Plan("bars-save-s3", "save-s3", "plain", ("45m", "180m"), ("socket_1", "cloudckpt"), _MANY_PAIRS),
    Plan("bars-save-s3-tls", "save-s3", "tls", ("45m",), ("socket_1", "cloudckpt"), PAIRS),
    Plan(
        "bars-save-s3-far", "save-s3", "far", ("45m",),
        ("socket_16", "cloudckpt", "awscrt_put", "s3torchconnector", "s3torchconnector_dcp", "boto3_upload",
         "obstore_put"),
        PAIRS,
    ),
    Plan("bars-save-local", "save-local", "disk", ("45m", "180m"), ("write_fsync", "cloudckpt"), PAIRS),
    Plan(
        "bars-stall", "stall-s3", "plain", ("45m",),
        ("memcpy", "cloudckpt", "dcp_async_process_fsspec", "dcp_async_staged_fsspec",
         "dcp_async_thread_s3torchconnector", "dcp_async_staged_s3torchconnector"),
        PAIRS,
    ),
    Plan("bars-load-s3", "load-s3", "plain", ("45m", "180m"), ("socket_1", "cloudckpt_restore"), _MANY_PAIRS),
    Plan("bars-load-s3-tls", "load-s3", "tls", ("45m",), ("socket_1", "cloudckpt_restore"), PAIRS),
    Plan("bars-load-s3-far", "load-s3", "far", ("45m",), ("socket_16", "cloudckpt_restore"), PAIRS),
    Plan("bars-tensors", "save-s3", "plain", ("flat-100000", "tensors-100000"), ("cloudckpt",), PAIRS),
    Plan("bars-discover", "discover", "plain", ("10000",), ("cloudckpt_latest", "cloudckpt_best"), 1),
)  # fmt: skip


def quick(plan: Plan) -> Plan | None:
    """The same bars at 0.5 GiB, if there are any, in fewer pairs: of 5, the largest ratio is the upper 95 % bound."""
    if plan.name == "bars-tensors":
        return None
    skipped = ("boto3_upload", "obstore_put", "dcp_async_thread_s3torchconnector", "dcp_async_process_fsspec")
    cases = tuple(name for name in plan.cases if name not in skipped)
    sizes = tuple(size for size in plan.sizes if size != "180m")
    return replace(plan, sizes=sizes, cases=cases, rounds=min(plan.rounds, 5))
