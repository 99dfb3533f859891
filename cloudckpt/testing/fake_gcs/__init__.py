"""A strict fake of Google Cloud Storage's JSON and XML APIs, over HTTP, in this process.

Emulators store what real Google Cloud Storage refuses: writes whose condition does not hold, bytes that are not those
of the checksum, a chunk that was sent twice. This one refuses what the documentation says is refused, and what it does
not know it answers with an error, never with a success.
"""

from __future__ import annotations

from cloudckpt.testing.fake_gcs.requests import Operation, Seen
from cloudckpt.testing.fake_gcs.server import FakeGCS

__all__ = ["FakeGCS", "Operation", "Seen"]
