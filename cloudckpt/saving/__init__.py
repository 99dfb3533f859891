"""Story 1: one save. Announce, stage, upload, seal, commit, delete.

``saver`` is what every rank does, ``leading`` what rank zero does besides, ``following`` what the others wait for.
"""

from cloudckpt.saving.job import SaveRequest
from cloudckpt.saving.saver import Saver

__all__ = ["SaveRequest", "Saver"]
