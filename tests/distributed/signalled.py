"""A training under torchrun that is signalled: started by ``test_torchrun_signals``, one process a rank.

python -m torch.distributed.run ... tests/distributed/signalled.py '{"root": ..., "steps": ..., ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, PreemptionGuard, Settings

QUICK = Settings(coordination_timeout_s=30, retry_base_s=0.01, retry_cap_s=0.05)
SAVE_EVERY = 5


def say(text: str) -> None:
    """One line, in one piece: all ranks write to one pipe."""
    os.write(1, f"{text}\n".encode())


def main(root: str, steps: int, signals: dict[str, float], *, hang: bool = False, fail_at: int | None = None) -> None:
    """Train from where the run is to ``steps``, or until told to stop.

    Args:
        hang: once told to stop, come to no further step.
        fail_at: rank one ends at this step without a word, in the first of torchrun's starts.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    state = {"w": torch.zeros(1000)}
    one = torch.ones(1)
    with PreemptionGuard(signals=signals, settings=QUICK) as guard, CheckpointManager(root, settings=QUICK) as ckpts:
        resumed = ckpts.restore(state)
        first = resumed.step + 1 if resumed else 0
        say(f"rank {rank} pid {os.getpid()} begins at {first}")
        for step in range(first, steps):
            state["w"] += 1
            time.sleep(0.01)  # the work of a step
            dist.all_reduce(one)
            one.fill_(1)
            if step == fail_at and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(7)
            if hang and guard.noticed:
                say(f"rank {rank} hangs")
                while True:
                    signal.pause()
            if guard.should_stop(step):
                ckpts.save(step, state, deadline_s=guard.left_s)
                say(f"rank {rank} stopped after step {step} with w {state['w'][0]:.0f}")
                break
            if (step + 1) % SAVE_EVERY == 0:
                ckpts.save(step, state).wait()
                if rank == 0:
                    say(f"committed {step}")
        else:
            say(f"rank {rank} finished with w {state['w'][0]:.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**json.loads(sys.argv[1]))
