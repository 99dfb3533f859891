"""Count up in one run's manifest, by transact, beside other processes: ``increment.py ROOT TIMES``."""

from __future__ import annotations

import sys
from dataclasses import replace

from cloudckpt.config import Settings
from cloudckpt.core.model import Manifest
from cloudckpt.storage import ManifestStore, open_storage


def main(root: str, times: int) -> None:
    """Raise ``next_seq`` that many times, each in a transact of its own."""
    store = ManifestStore(open_storage(root), Settings(retry_base_s=0.005, retry_cap_s=0.1))
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(times):
        store.transact(
            lambda m, _: replace(m, next_seq=m.next_seq + 1),
            prepare=lambda _: None,
            new=lambda: Manifest(run_id=store.token(32)),
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
