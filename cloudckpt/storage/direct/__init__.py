"""The direct payload lane: views of memory to the socket, ranges from the socket into memory, a few threads.

What is here knows HTTP and nothing of a store. The lane of each store signs the requests with the filesystem's own
credentials and says what an answer means.
"""

from cloudckpt.storage.direct.address import Address, Declined, proxy_of
from cloudckpt.storage.direct.crew import Attempts, BrokenOff, Crew, Stop
from cloudckpt.storage.direct.throttle import Throttle
from cloudckpt.storage.direct.wire import Answer, Request, Wire, WireError

__all__ = [
    "Address",
    "Answer",
    "Attempts",
    "BrokenOff",
    "Crew",
    "Declined",
    "Request",
    "Stop",
    "Throttle",
    "Wire",
    "WireError",
    "proxy_of",
]
