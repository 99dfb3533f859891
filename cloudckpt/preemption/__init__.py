"""A machine is about to be taken away: notice it, agree on the step at which to stop, and say how long is left.

``signals`` and ``watching`` notice, ``metadata`` asks the clouds' own servers, ``agreeing`` finds one step for all
ranks, ``guard`` is what a training loop holds. Whether a last save is made is ``CheckpointManager.save(deadline_s=)``.
"""

from cloudckpt.preemption.guard import PreemptionGuard
from cloudckpt.preemption.workers import shield_worker

__all__ = ["PreemptionGuard", "shield_worker"]
