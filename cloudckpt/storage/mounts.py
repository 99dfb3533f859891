"""On what kind of file system a folder lies, and what that means for a run (Linux; elsewhere nobody knows).

A run on a disk stands on three promises: a rename replaces at once, an fsync means the disk, and a lock holds for every
process that writes. Network file systems keep them if they are set up to; a bucket mounted as a folder keeps none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mount", "mount_of", "promises"]

_TABLE = Path("/proc/self/mountinfo")
#: A blank, a tab, a newline and a backslash are written as these.
_ESCAPED = re.compile(r"\\([0-7]{3})")

#: File systems that are a bucket behind: renames are copies, and nobody keeps a lock.
_BUCKETS = re.compile(r"fuse\.(s3fs|gcsfuse|goofys|mountpoint-s3|geesefs|rclone|juicefs-s3|blobfuse2?|ossfs|cosfs).*")
#: File systems that other machines write to as well.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2", "ocfs2"}


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system: its kind, such as "ext4" or "nfs4", and where it is mounted."""

    kind: str
    place: str


def mount_of(path: Path, table: str | None = None) -> Mount | None:
    """The file system that a path lies on, or will lie on; None if this system does not tell.

    Args:
        path: an absolute path.
        table: the mounts as ``/proc/self/mountinfo`` lists them; by default that.
    """
    if table is None:
        try:
            table = _TABLE.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    found: Mount | None = None
    for line in table.splitlines():
        front, dash, back = line.partition(" - ")
        fields = front.split(" ")
        if not dash or len(fields) < 5:
            continue
        place = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), fields[4])
        # The later of two mounts of one place is on top of the other.
        if path.is_relative_to(place) and (found is None or len(place) >= len(found.place)):
            found = Mount(_kind(back), place)
    return found


def _kind(back: str) -> str:
    """The kind, from what stands after the dash: kind, source, options. Some of FUSE leave theirs to the source."""
    kind, _, rest = back.partition(" ")
    return f"fuse.{rest.partition(' ')[0]}" if kind == "fuse" else kind


def promises(kind: str) -> tuple[bool, str]:
    """Whether a run may stand on this kind of file system, and what is to be known about it."""
    if _BUCKETS.fullmatch(kind):
        return False, (
            f"{kind}: a bucket that is mounted as a folder. Renames are none there and locks are not kept, so two "
            "writers could destroy each other's work: write the bucket's own URL (s3://…, gs://…)"
        )
    if kind in _NETWORK or kind.startswith("fuse."):
        return True, (
            f"{kind}: shared with other machines. Locks must be kept between them (NFS: version 4, or lockd, and no "
            "nolock), or only one process may ever write"
        )
    return True, kind
