"""What the ranks of a job say to each other for one save, in bytes; and how long a round of many ranks takes.

    torchrun --nproc-per-node 4 benchmarks/ranks.py
    python benchmarks/ranks.py --ranks 1024

Under torchrun: FSDP2 over a small transformer and AdamW on local disk. The first two saves plan and warm up; of the
later ones every message of the ranks' channel is counted as it is framed (TCP and IP add 52 bytes or so a packet).

Alone: so many ranks in one process, each with its two threads and a real connection to rank zero, make the agreement
of a steady-state save (one vote, one exchange) with nothing around it. What is printed is the processor time of rank
zero's threads, which is what a real job waits for at least; the wall time of so many threads in one interpreter says
nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter

import torch
import torch.distributed as dist
from cloudckpt import CheckpointManager, PerRank, Settings, TrainState, rng_state
from cloudckpt.coordination import Ballot, ManyRanks
from cloudckpt.coordination.channel import Channel, _framed
from cloudckpt.coordination.group import Group
from torch import nn
from torch.distributed.fsdp import fully_shard

WARM, COUNTED = 2, 10
#: What the topics are about that every rank waits for.
AGREEING = {"ballot": "vote", "save": "number and id", "save-plan": "plan", "save-replicas": "sums"}
MANY = 1024


def count_frames(sent: Counter[tuple[int, str]]) -> None:
    """From here on every message that a channel sends is counted, by receiver and topic."""
    queue = Channel._queue  # noqa: SLF001 - what goes out goes out there

    def counted(self: Channel, line: object, topic: str, body: bytes) -> None:
        peer = line.peer  # type: ignore[attr-defined]  # a private class of the channel
        about = topic.partition("/")[0]
        sent[peer.rank, AGREEING.get(about, about)] += len(_framed(topic, body))
        queue(self, line, topic, body)  # type: ignore[arg-type]  # wraps a method

    Channel._queue = counted  # type: ignore[method-assign]  # noqa: SLF001 - the same


def one_job() -> None:
    """Count, on every rank of a job under torchrun; rank zero prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = [tempfile.mkdtemp(prefix="cloudckpt-ranks-") if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    block = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    model = nn.TransformerEncoder(block, 6, enable_nested_tensor=False)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainState(model, optimizer, rng=PerRank(rng_state()))
    sent: Counter[tuple[int, str]] = Counter()
    count_frames(sent)
    first: Counter[tuple[int, str]] = Counter()
    revisions = []
    with CheckpointManager(folder[0], keep_last=3, settings=Settings(coordination_timeout_s=60)) as ckpts:
        for step in range(WARM + COUNTED):
            if step == 1:
                first = Counter(sent)
            if step == WARM:
                dist.barrier()
                sent.clear()
                revisions.append(ckpts.manifest().revision)
            ckpts.save(step, state, metrics={"loss": 1.0}).wait()
            dist.barrier()
        counted = Counter(sent)
        revisions.append(ckpts.manifest().revision)
    told: list[Counter[tuple[int, str]]] = [Counter()] * ranks
    dist.all_gather_object(told, counted)
    firsts: list[Counter[tuple[int, str]]] = [Counter()] * ranks
    dist.all_gather_object(firsts, first)
    if rank == 0:
        tensors = sum(len(own) for own in optimizer.state.values()) + len([*model.parameters()])
        print(f"{ranks} ranks, {tensors} tensors, {COUNTED} steady-state saves; bytes a save and rank, mean (max):")
        total = 0.0
        for what in sorted({topic for own in told for _, topic in own}):
            up = [told[r][0, what] / COUNTED for r in range(1, ranks)]
            down = [told[0][r, what] / COUNTED for r in range(1, ranks)]
            total += statistics.mean(up) + statistics.mean(down)
            print(
                f"{what:>13}: to rank zero {statistics.mean(up):6.0f} ({max(up):.0f}), "
                f"from rank zero {statistics.mean(down):6.0f} ({max(down):.0f})"
            )
        planned = statistics.mean(sum(own.values()) for own in firsts[1:]) + sum(firsts[0].values()) / (ranks - 1)
        print(f"all of it: {total:.0f} a rank, {total * (MANY - 1) / 1e6:.2f} MB at rank zero of {MANY:,} ranks")
        print(f"the first save, which plans: {planned:.0f} a rank")
        print(f"manifest writes a save: {(revisions[1] - revisions[0]) / COUNTED:g}")
        shutil.rmtree(folder[0])
    dist.destroy_process_group()


class _Found(Group):
    """Ranks of one process: the number of the channel is given, not counted."""

    def next_key(self, whose: str = "") -> str:
        return f"many{whose}"


def many_in_one_process(ranks: int, rounds: int) -> None:
    """Agree again and again, all ranks in threads; prints the time of a round."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard > soft else (soft, hard))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
    everybody = tuple(range(ranks))
    jobs = [ManyRanks(_Found(rank=rank, ranks=everybody, store=store), timeout_s=600) for rank in everybody]
    met, took = threading.Barrier(ranks), []
    word = b"3 0123456789abcdef"

    def rank_does(own: ManyRanks) -> None:
        for number in range(rounds + 1):
            met.wait()
            began = _processor_s(own) if own.rank == 0 and number else 0.0  # the first one connects
            own.vote(Ballot(call="save", root="s3://bucket/run", step=number, components=("model", "optimizer", "rng")))
            own.exchange("save", word, lambda words: [b"9f3ac2e1="] * len(words))
            met.wait()
            if own.rank == 0 and number:
                took.append(_processor_s(own) - began)
        own.leave("done")

    threads = [threading.Thread(target=rank_does, args=[own]) for own in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    middle, most = 1000 * statistics.median(took), 1000 * max(took)
    print(f"{ranks} ranks: a vote and an exchange take rank zero {middle:.1f} ms of a processor")
    print(f"(median of {rounds}, max {most:.1f})")


def _processor_s(own: ManyRanks) -> float:
    """What the calling thread and the channel's have computed so far, in seconds."""
    channel = own._channel  # noqa: SLF001 - whose thread it is
    assert channel is not None
    assert channel._thread is not None  # noqa: SLF001 - the same
    assert channel._thread.ident is not None  # noqa: SLF001 - the same
    return time.thread_time() + time.clock_gettime(time.pthread_getcpuclockid(channel._thread.ident))  # noqa: SLF001 - the same


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="so many in one process, without torchrun")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.ranks:
        many_in_one_process(args.ranks, args.rounds)
    elif "RANK" not in os.environ:
        parser.error("start it under torchrun, or with --ranks")
    else:
        one_job()


if __name__ == "__main__":
    main()
