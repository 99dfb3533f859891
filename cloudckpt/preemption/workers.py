"""Data loader workers live on when their whole process group is told to stop.

torchrun and Slurm signal whole process groups. A data loader's worker dies of SIGTERM at once, torch then raises a
``RuntimeError`` in the training process, and the last save is lost to it. A worker that just ignores the signal cannot
be ended by its own parent any more, which then waits for it for ever; so the sender is looked at.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

__all__ = ["shield_worker"]

_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2")


def shield_worker(worker_id: int = 0) -> None:
    """Keep a data loader's worker alive when its process group is signalled: ``DataLoader(worker_init_fn=...)``.

    From then on SIGTERM ends this worker only if its parent sends it, and SIGUSR1 and SIGUSR2 never do. It ends with
    its data loader as ever, and with its parent. Programs that it starts inherit the blocked signals. Does nothing
    where the system does not tell who sent a signal (macOS).
    Threads that libraries have started before are not shielded: OpenBLAS has some in spawned processes, unless
    ``OMP_NUM_THREADS`` is 1, which torchrun sets.

    Args:
        worker_id: as the data loader passes it; not used.
    """
    del worker_id
    if not hasattr(signal, "sigwaitinfo"):
        return
    shielded = {getattr(signal, name) for name in _NAMES}
    # Blocked for this thread and all that it starts: what arrives is then for the thread that waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, shielded)
    parents = {os.getppid()}
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        parents.add(parent.pid)  # not the same under a fork server
    threading.Thread(target=_obey, args=(frozenset(parents), shielded), name="cloudckpt-shield", daemon=True).start()


def _obey(parents: frozenset[int], shielded: set[signal.Signals]) -> None:
    while True:
        told = signal.sigwaitinfo(shielded)
        if told.si_signo == signal.SIGTERM and told.si_pid in parents:
            os._exit(0)  # as torch's own handler in a worker does
