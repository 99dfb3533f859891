"""An editor beside a running trainer: pins, unpins, reports metrics, and collects garbage, again and again."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import cloudckpt
from cloudckpt import Settings, editing
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.sweeping import gc_run
from cloudckpt.tools import open_store

#: A writer that never rests wins most races for the manifest. The usual pauses before the next try, up to seconds, are
#: made for stores across a network: here they would be nearly all of the time, in which nothing is disturbed.
EAGER = Settings(retry_base_s=0.005, retry_cap_s=0.05)


def main() -> None:
    """Make ``pins`` pins and ``gcs`` garbage collections in a random but fixed order."""
    root, pins, gcs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = open_store(root, settings=EAGER)
    view = cloudckpt.open(root)
    rng = random.Random(1)
    acts = ["pin"] * pins + ["gc"] * gcs
    rng.shuffle(acts)
    done = {"pin": 0, "gc": 0, "missed": 0}
    for act in acts:
        if act == "gc":
            gc_run(open_store(root, settings=EAGER), dry_run=False)  # as cloudckpt.gc does it
            done["gc"] += 1
            continue
        while True:
            chosen = rng.choice(view.checkpoints())
            try:
                # Every other one is given back, so that retention has something to do.
                editing.pin(store, chosen.name)
                if done["pin"] % 2:
                    editing.pin(store, chosen.name, pinned=False)
            except CheckpointNotFoundError:
                done["missed"] += 1  # the trainer retired it first; choose again
                continue
            break
        done["pin"] += 1
    Path(f"{root}.editor").write_text(f"{done['pin']} {done['gc']}")


if __name__ == "__main__":
    main()
