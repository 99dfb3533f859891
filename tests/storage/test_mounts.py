"""On what kind of file system a run lies, as the kernel lists it, and what the doctor says about it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cloudckpt.cli import doctor
from cloudckpt.cli.doctor import examine
from cloudckpt.storage.mounts import Mount, mount_of, promises

TABLE = """\
22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw
28 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
30 28 0:40 / /mnt/team rw,relatime - nfs4 server:/team rw,vers=4.2
31 28 0:41 / /mnt/team/bucket rw - fuse.gcsfuse gcsfuse rw
35 28 0:45 / /mnt/team/mountpoint rw - fuse mountpoint-s3 rw
32 28 0:42 / /mnt/with\\040a\\040blank rw - cifs //host/share rw
33 28 0:43 / /mnt/twice rw - xfs /dev/sdb rw
34 33 0:44 / /mnt/twice rw - tmpfs tmpfs rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/home/me/runs", Mount("ext4", "/")),
        ("/mnt/team/runs/demo", Mount("nfs4", "/mnt/team")),
        ("/mnt/team2", Mount("ext4", "/")),
        ("/mnt/team/bucket/run", Mount("fuse.gcsfuse", "/mnt/team/bucket")),
        ("/mnt/team/mountpoint/run", Mount("fuse.mountpoint-s3", "/mnt/team/mountpoint")),
        ("/mnt/with a blank/run", Mount("cifs", "/mnt/with a blank")),
        ("/mnt/twice/run", Mount("tmpfs", "/mnt/twice")),
    ],
)
def test_the_mount_of_a_path(path: str, mount: Mount) -> None:
    """The deepest one that holds it, the later one of two at one place; blanks are unescaped."""
    assert mount_of(Path(path), TABLE) == mount


def test_where_nobody_tells_nobody_knows() -> None:
    """A table without a mount for the path gives none."""
    assert mount_of(Path("/x"), "") is None


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_this_machine_has_one(tmp_path: Path) -> None:
    """The kernel's own table is understood."""
    found = mount_of(tmp_path)
    assert found is not None
    assert tmp_path.is_relative_to(found.place)


@pytest.mark.parametrize(
    ("kind", "usable", "says"),
    [
        ("ext4", True, "ext4"),
        ("nfs4", True, "shared with other machines"),
        ("fuse.sshfs", True, "shared with other machines"),
        ("fuse.gcsfuse", False, "write the bucket's own URL"),
        ("fuse.s3fs", False, "write the bucket's own URL"),
        ("fuse.mountpoint-s3", False, "write the bucket's own URL"),
    ],
)
def test_what_each_kind_promises(kind: str, usable: bool, says: str) -> None:
    """Disks are named, shared file systems come with what their locks must do, mounted buckets are refused."""
    found, sentence = promises(kind)
    assert found is usable
    assert says in sentence


@pytest.mark.parametrize(("kind", "ready"), [("ext4", True), ("nfs4", True), ("fuse.gcsfuse", False)])
def test_a_network_file_system_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ready: bool
) -> None:
    """The doctor says on what a folder lies, and is not content with a bucket that is mounted as one."""
    monkeypatch.setattr(doctor, "mount_of", lambda _: Mount(kind, "/"))
    report = examine(str(tmp_path))
    (check,) = (check for check in report.checks if check.name == "file system")
    assert kind in check.detail
    assert check.ok is ready
    assert report.ok is ready
