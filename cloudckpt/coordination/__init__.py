"""How the ranks of one job agree: one vote before each collective call, one channel of their own, one error for all.

Nothing here uses NCCL or a collective of the training's process group: that group's store hands over one address, once.
"""

from cloudckpt.coordination.failure import Failure, is_common
from cloudckpt.coordination.group import find_group
from cloudckpt.coordination.protocol import Ballot, Coordinator, SingleProcess, Verdict
from cloudckpt.coordination.ranks import ManyRanks

__all__ = ["Ballot", "Coordinator", "Failure", "ManyRanks", "SingleProcess", "Verdict", "find_group", "is_common"]
