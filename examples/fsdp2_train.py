"""Train a small transformer under FSDP2 on several processes, on CPUs or GPUs, and keep its checkpoints.

The text is the help of the interpreter itself (``pydoc_data``, part of CPython), so nothing is downloaded. Kill a
worker whenever you like: torchrun starts all of them again, they go on from the last committed checkpoint, and end
with the very same weights, which the last line sums up.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # or torch may not survive a restart: docs/guide/distributed.md
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 examples/fsdp2_train.py --root ./runs/fsdp2

Every process runs the same lines; where they differ is marked with "rank".
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import cloudckpt
from cloudckpt import CheckpointManager, PerRank, TrainState

CONTEXT = 64
BATCH = 8


class Block(nn.Module):
    """A layer of a decoder: attention to what came before, then a small network, each on top of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        asked, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attention(self.before_attention(hidden)).chunk(3, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(asked, keys, values, is_causal=True)
        hidden = hidden + functional.dropout(self.out(seen.transpose(1, 2).flatten(2)), 0.1, self.training)
        found: torch.Tensor = hidden + self.network(self.before_network(hidden))
        return found


class Transformer(nn.Module):
    """A causal language model over letters."""

    def __init__(self, letters: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, letters, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def digest_of(model: nn.Module) -> str:
    """What the whole weights sum up to. All ranks take part, rank zero gets the answer."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    found = hashlib.sha256()
    for name, weight in sorted(whole.items()):
        assert isinstance(weight, torch.Tensor)
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="./runs/fsdp2", help="a folder that all ranks share, or a URL")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    # Sums in one order, so that two runs agree to the last bit.
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    rank = dist.get_rank()

    text = "".join(topics[name] for name in sorted(topics))[:300_000]
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text])

    torch.manual_seed(0)  # the same weights on every rank ...
    model = Transformer(len(alphabet), args.width, args.layers).to(device)
    torch.manual_seed(1000 + rank)  # ... and other data and dropout on each
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    state = TrainState(model, optimizer, scheduler=scheduler, rng=PerRank(cloudckpt.rng_state()))
    with CheckpointManager(args.root, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        # On another number of ranks the weights and moments are the same; ranks that are new begin with random numbers
        # of their own. Leave strict_world_size out where that is to be refused.
        resumed = ckpts.restore(state, strict_world_size=False)
        for step in range(resumed.step + 1 if resumed else 0, args.steps):
            starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,))
            rows = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts]).to(device)
            loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            scheduler.step()
            if (step + 1) % args.save_every == 0:
                mean = loss.detach() / dist.get_world_size()
                dist.all_reduce(mean)
                ckpts.save(step, state, metrics={"loss": mean.item()})
    digest = digest_of(model)
    if rank == 0:
        print(f"weights {digest}")
    dist.barrier()  # rank zero may keep the store that the others still talk to
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
