"""What went wrong on one rank, as the others are told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cloudckpt import errors
from cloudckpt.errors import CloudCkptError, SaveError

__all__ = ["Failure", "is_common", "mark_common"]

#: On an error that all ranks raise: so that it is told once, should it end a later exchange of the same call as well.
_COMMON = "_cloudckpt_told_to_all"
#: Past this a message says nothing new, and it goes to every rank and into the manifest.
_LONGEST = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One rank's error.

    Attributes:
        rank: where it happened.
        host: the machine's name.
        kind: the name of the error's class.
        message: what it said.
    """

    rank: int
    host: str
    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException, *, rank: int, host: str) -> Failure:
        """An error of this rank, as the others are told."""
        message = str(error) or type(error).__name__
        return cls(rank=rank, host=host, kind=type(error).__name__, message=message[:_LONGEST])

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Failure:
        """The failure again."""
        return cls(**json.loads(body))

    @property
    def where(self) -> str:
        """The rank and its host."""
        return f"rank {self.rank} ({self.host})"

    def __str__(self) -> str:
        known = _class_named(self.kind) is not None
        return f"{self.where}: {self.message}" if known else f"{self.where}: {self.kind}: {self.message}"

    def again(self) -> CloudCkptError:
        """The very error, where it says all that is to be said."""
        return (_class_named(self.kind) or SaveError)(self.message)

    def error(self, what: str, *, otherwise: type[CloudCkptError] = SaveError) -> CloudCkptError:
        """The error that every rank raises: of the same class where that is one of ours, so that callers act alike.

        Args:
            what: what was being done, for the message.
            otherwise: the class for errors that are none of ours.
        """
        return (_class_named(self.kind) or otherwise)(f"{what} failed on {self}")


def _class_named(name: str) -> type[CloudCkptError] | None:
    found = getattr(errors, name, None) if name in errors.__all__ else None
    return found if isinstance(found, type) and issubclass(found, CloudCkptError) else None


def mark_common(error: CloudCkptError) -> CloudCkptError:
    """The error, as one that all ranks raise."""
    setattr(error, _COMMON, True)
    return error


def is_common(error: object) -> bool:
    """Whether all ranks were told this error."""
    return getattr(error, _COMMON, False)
