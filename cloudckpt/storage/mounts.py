"""On what kind of file system a folder lies, and what that means for a run (Linux; elsewhere nobody knows).

A run on a disk stands on three promises: a rename replaces at once, an fsync means the disk, and a lock holds for every
process that writes. Network file systems keep them if they are set up to; a bucket mounted as a folder keeps none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Mount", "doubt_about", "mount_of", "promises"]

_TABLE = Path("/proc/self/mountinfo")
#: A blank, a tab, a newline and a backslash are written as these.
_ESCAPED = re.compile(r"\\([0-7]{3})")

#: File systems that are a bucket behind: renames are copies, and nobody keeps a lock.
_BUCKETS = re.compile(r"fuse\.(s3fs|gcsfuse|goofys|mountpoint-s3|geesefs|rclone|juicefs-s3|blobfuse2?|ossfs|cosfs).*")
#: File systems that other machines write to as well.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2", "ocfs2"}
#: File systems whose locks hold on this machine only, however they are mounted.
_OWN_LOCKS = {"fuse.sshfs", "fuse.curlftpfs"}
#: Options of a mount by which locks hold on this machine only: of NFS, of SMB, of Lustre, of cluster file systems.
#: (NFS's local_lock=posix is none of them: our lock is flock's, and goes to the server.)
_KEPT_HERE = {"nolock", "local_lock=all", "local_lock=flock", "nobrl", "localflock", "localflocks"}


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system.

    Attributes:
        kind: such as "ext4" or "nfs4".
        place: where it is mounted.
        options: what it is mounted with.
    """

    kind: str
    place: str
    options: frozenset[str] = field(default=frozenset(), compare=False)


def mount_of(path: Path, table: str | None = None) -> Mount | None:
    """The file system that a path lies on, or will lie on; None if this system does not tell.

    Args:
        path: an absolute path; what a symbolic link in it leads to counts.
        table: the mounts as ``/proc/self/mountinfo`` lists them; by default that.
    """
    if table is None:
        try:
            table = _TABLE.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    path = path.resolve()
    found: Mount | None = None
    for line in table.splitlines():
        front, dash, back = line.partition(" - ")
        fields = front.split(" ")
        if not dash or len(fields) < 6:
            continue
        place = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), fields[4])
        # The later of two mounts of one place is on top of the other.
        if path.is_relative_to(place) and (found is None or len(place) >= len(found.place)):
            found = Mount(_kind(back), place, frozenset(f"{fields[5]},{back.rpartition(' ')[2]}".split(",")))
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


def doubt_about(mount: Mount) -> str | None:
    """Why the locks of a file system are no protection from writers on other machines; None if they may be one."""
    kept_here = sorted(mount.options & _KEPT_HERE)
    if _BUCKETS.fullmatch(mount.kind):
        return (
            f"a bucket that is mounted as a folder ({mount.kind} at {mount.place}), where locks are not kept and "
            "renames are none. Write the bucket's own URL (s3://…, gs://…)"
        )
    if mount.kind in _OWN_LOCKS:
        return (
            f"a network file system ({mount.kind} at {mount.place}) whose locks hold on this machine only. Use one "
            "that keeps locks between machines, or an object store"
        )
    if kept_here and mount.kind in _NETWORK:
        return (
            f"a network file system ({mount.kind} at {mount.place}) that is mounted with {', '.join(kept_here)}: its "
            "locks hold on this machine only. Mount it without that, or use an object store"
        )
    return None
