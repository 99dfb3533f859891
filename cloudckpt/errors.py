"""The error tree.

A class exists only where a caller would act differently:

    CloudCkptError
    ├── CheckpointNotFoundError (LookupError)   nothing matches: start fresh, or list what there is
    ├── ConflictError                           somebody else changed the run: read again and decide
    │   └── FencedError                         a newer writer owns the run: stop this process
    ├── SaveError                               this save is not visible: keep training, save again
    │   ├── CommitUnknownError                  the store never answered: look again when it is back
    │   └── RankError                           another rank is gone, late or elsewhere: restart the job
    ├── CorruptCheckpointError                  stored bytes are not what was sealed: load another one
    ├── FormatError (ValueError)                not a run, or a newer format: upgrade, repair, or fix the URL
    ├── StateMismatchError (ValueError)         the state does not fit: fix it, or pass ``strict=False``
    ├── StorageError (OSError)                  the environment refused: see ``.retryable``
    │   ├── ObjectNotFoundError                 the store says that the object, or those bytes, do not exist
    │   └── UnsafeStorageError                  the store ignores conditions: use another one
    └── ConfigError (ValueError)                a setting cannot be used as given
"""

from __future__ import annotations

__all__ = [
    "CheckpointNotFoundError",
    "CloudCkptError",
    "CommitUnknownError",
    "ConfigError",
    "ConflictError",
    "CorruptCheckpointError",
    "FencedError",
    "FormatError",
    "ObjectNotFoundError",
    "RankError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
    "UnsafeStorageError",
]


class CloudCkptError(Exception):
    """Base of everything this package raises on purpose.

    ``exit_code`` is what the command line exits with, and what a training script may pass to ``sys.exit``:
    1 failure, 2 usage, 3 findings, 4 nothing matches, 5 conflict (a supervisor must not restart on 5).
    """

    exit_code = 1


class CheckpointNotFoundError(CloudCkptError, LookupError):
    """No committed checkpoint matches what was asked for."""

    exit_code = 4

    def __str__(self) -> str:
        # LookupError has no quoting of its own, but KeyError-like siblings do: keep the sentence as written.
        return str(self.args[0]) if self.args else ""


class ConflictError(CloudCkptError):
    """Somebody else changed the run in a way that this process cannot build upon."""

    exit_code = 5


class FencedError(ConflictError):
    """A newer writer has claimed the run. This process must stop; it has deleted nothing."""


class SaveError(CloudCkptError):
    """This save did not become visible. Earlier checkpoints are untouched; training may go on."""


class CommitUnknownError(SaveError):
    """The store never said whether a manifest write landed. Nothing was deleted on the doubt."""


class RankError(SaveError):
    """Another rank of the job is gone, did not call in time, or called something else; says which, and where."""


class CorruptCheckpointError(CloudCkptError):
    """Stored bytes are missing or differ from what was sealed.

    Attributes:
        checkpoint_id: save id of the damaged checkpoint, where known.
        key: key of the damaged object relative to the root, where known.
    """

    exit_code = 3

    def __init__(self, message: str, *, checkpoint_id: str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint_id = checkpoint_id
        self.key = key


class FormatError(CloudCkptError, ValueError):
    """A document is not what the format demands, or was written by a newer version."""


class StateMismatchError(CloudCkptError, ValueError):
    """The caller's state and the checkpoint do not have the same names, shapes or types."""


class StorageError(CloudCkptError, OSError):
    """The store or the disk refused.

    Attributes:
        retryable: whether the same request may succeed later without anybody changing anything.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class ObjectNotFoundError(StorageError):
    """The store answered that an object, or a byte range of it, does not exist: a proof, not a doubt."""


class UnsafeStorageError(StorageError):
    """The store does not honour conditional writes, so two writers could destroy each other's work."""


class ConfigError(CloudCkptError, ValueError):
    """A setting cannot be used as given; the message says what to write instead."""

    exit_code = 2
