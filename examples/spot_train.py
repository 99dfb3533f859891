"""Train on machines that may be taken away: stop after a step, save what there is time for, go on elsewhere.

The text is the help of the interpreter itself (``pydoc_data``, part of CPython), so nothing is downloaded. Send SIGTERM
whenever you like, start it again by the same command line: it goes on with the next step. On one process, or several:

    python examples/spot_train.py --root ./runs/spot
    torchrun --standalone --nproc-per-node 2 examples/spot_train.py --root ./runs/spot

On EC2 spot instances pass ``--aws``, on Compute Engine ``--gcp``, under Slurm ``--signals SIGTERM,SIGUSR1``; the traps
of each are in docs/guide/preemption.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from cloudckpt import CheckpointManager, PreemptionGuard
from cloudckpt.preemption import shield_worker

CONTEXT = 16
BATCH = 32


class Windows(Dataset[torch.Tensor]):
    """Pieces of a text, by where they begin."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens) - CONTEXT - 1

    def __getitem__(self, start: int) -> torch.Tensor:
        return self.tokens[start : start + CONTEXT + 1]


class Batches:
    """Which pieces each step reads, as a function of step and rank: so there is nothing to save for going on."""

    def __init__(self, pieces: int, first: int, steps: int, rank: int) -> None:
        self.pieces, self.first, self.steps, self.rank = pieces, first, steps, rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            generator = torch.Generator().manual_seed(1000 * step + self.rank)
            starts: list[int] = torch.randint(self.pieces, (BATCH,), generator=generator).tolist()
            yield starts

    def __len__(self) -> int:
        return max(0, self.steps - self.first)


def new_model(letters: int, width: int) -> nn.Module:
    """Guess the next letter from the last ones."""
    return nn.Sequential(
        nn.Embedding(letters, width),
        nn.Flatten(),
        nn.Linear(CONTEXT * width, 4 * width),
        nn.GELU(),
        nn.Linear(4 * width, letters),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="./runs/spot", help="where the checkpoints go: a folder or a URL")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that load data, for each rank")
    parser.add_argument("--signals", default="SIGTERM", help="which signals are notices, with commas between them")
    parser.add_argument("--notice", type=float, default=25.0, help="seconds there are after a signal")
    parser.add_argument("--aws", action="store_true", help="look for EC2's spot notices")
    parser.add_argument("--gcp", action="store_true", help="wait for Compute Engine's preemption notices")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)

    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)

    text = "".join(topics[name] for name in sorted(topics))[:300_000]
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text])

    torch.manual_seed(0)
    model = new_model(len(alphabet), args.width)
    trained = DistributedDataParallel(model) if many else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer}

    guard = PreemptionGuard(signals=args.signals.split(","), notice_s=args.notice, aws=args.aws, gcp=args.gcp)
    with guard, CheckpointManager(args.root, keep_last=2) as ckpts:
        resumed = ckpts.restore(state)
        first = resumed.step + 1 if resumed else 0
        data = Windows(tokens)
        loader = DataLoader(
            data,
            batch_sampler=Batches(len(data), first, args.steps, rank),
            num_workers=args.workers,
            worker_init_fn=shield_worker,  # schedulers signal whole process groups, and the workers would die first
        )
        for step, rows in enumerate(loader, first):
            loss = functional.cross_entropy(trained(rows[:, :-1]), rows[:, -1])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            if guard.should_stop(step):
                ckpts.save(step, state, deadline_s=guard.left_s)
                print(f"rank {rank} of {ranks} stopped after step {step}: {guard.reason}", flush=True)
                break
            if (step + 1) % args.save_every == 0:
                ckpts.save(step, state)
    if many:
        dist.barrier()  # rank zero may keep the store that the others still talk to
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
