"""On what kind of file system a run lies, as the kernel lists it, and what the doctor says about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cloudckpt import CheckpointManager, FormatError, UnsafeStorageError
from cloudckpt.cli import doctor
from cloudckpt.cli.doctor import examine
from cloudckpt.events import Event, Warned
from cloudckpt.storage import mounts
from cloudckpt.storage.mounts import Mount, doubt_about, mount_of, promises

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


def test_a_link_counts_as_where_it_leads(tmp_path: Path) -> None:
    """A folder in a home that is a link to a network file system lies on that."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    table = f"28 1 8:2 / / rw - ext4 /dev/sda2 rw\n30 28 0:40 / {tmp_path}/there rw - nfs4 server:/team rw\n"
    assert mount_of(tmp_path / "link" / "run", table) == Mount("nfs4", f"{tmp_path}/there")


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


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rw,relatime - ext4 /dev/sda2 rw", None),
        ("rw - ext4 /dev/sda2 rw,nolock", None),
        ("rw - nfs4 server:/team rw,vers=4.2,local_lock=none", None),
        ("rw - nfs server:/team rw,vers=3,local_lock=posix", None),
        ("rw - fuse.juicefs JuiceFS:myjfs rw", None),
        ("rw - nfs server:/team rw,vers=3,nolock,local_lock=all", "mounted with local_lock=all, nolock"),
        ("rw - nfs4 server:/team rw,local_lock=flock", "mounted with local_lock=flock"),
        ("rw - cifs //host/share rw,nobrl", "mounted with nobrl"),
        ("rw,localflock - lustre mgs@tcp:/fs rw", "mounted with localflock"),
        ("rw - fuse.sshfs me@host: rw", "locks hold on this machine only"),
        ("rw - fuse.gcsfuse gcsfuse rw", "Write the bucket's own URL"),
        ("rw - fuse mountpoint-s3 rw", "Write the bucket's own URL"),
    ],
)
def test_whose_locks_are_no_protection(line: str, says: str | None) -> None:
    """Mounted buckets, what never asks a server, and what was told not to; a network alone is no reason."""
    mount = mount_of(Path("/mnt/team/run"), f"28 1 8:2 / / rw - ext4 /dev/sda2 rw\n30 28 0:40 / /mnt/team {line}\n")
    assert mount is not None
    doubt = doubt_about(mount)
    assert (doubt is None) if says is None else (doubt is not None and says in doubt and "/mnt/team" in doubt)


NO_LOCK = "nfs server:/team rw,vers=3,nolock"


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Makes the folder of the test lie on something else; the list grows by one with each look at the table."""
    looks: list[int] = []

    def lie_on(what: str) -> list[int]:
        table = f"28 1 8:2 / / rw - ext4 /dev/sda2 rw\n30 28 0:40 / {tmp_path} rw - {what}\n"

        class Table:
            @staticmethod
            def read_text(**_: str) -> str:
                looks.append(1)
                return table

        monkeypatch.setattr(mounts, "_TABLE", Table)
        return looks

    return lie_on


def warnings_of(ckpts: CheckpointManager, seen: list[Event], step: int) -> list[str]:
    """What was warned of until this step is saved."""
    ckpts.save(step, {"w": torch.ones(3)}, block=True)
    return [event.message for event in seen if isinstance(event, Warned)]


def test_a_claim_on_locks_that_do_not_hold_warns_once(tmp_path: Path, on: Callable[[str], list[int]]) -> None:
    """One warning for each manager: on what the run lies, what may happen, what to do. Saves add none."""
    on(NO_LOCK)
    for number in (1, 2):
        seen: list[Event] = []
        with CheckpointManager(tmp_path / "run", listeners=[seen.append]) as ckpts:
            ckpts.restore({"w": torch.zeros(3)})
            warnings_of(ckpts, seen, 2 * number)
            (said,) = warnings_of(ckpts, seen, 2 * number + 1)
        assert str(tmp_path / "run") in said
        assert f"nfs at {tmp_path}" in said
        assert "nolock" in said
        assert "let only one process write" in said
        assert "Mount it without that" in said


def test_a_claim_that_is_tried_again_does_not_warn_again(tmp_path: Path, on: Callable[[str], list[int]]) -> None:
    """A first claim that failed has warned already."""
    on(NO_LOCK)
    seen: list[Event] = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_bytes(b"no manifest")
    ckpts = CheckpointManager(tmp_path / "run", listeners=[seen.append])
    for _ in range(2):
        with pytest.raises(FormatError):
            ckpts.save(1, {"w": torch.ones(3)})
    assert len([event for event in seen if isinstance(event, Warned)]) == 1
    ckpts.close()


@pytest.mark.parametrize("what", ["ext4 /dev/sdb rw", "nfs4 server:/team rw,vers=4.2,local_lock=none"])
@pytest.mark.parametrize("takeover", ["last_wins", "refuse"])
def test_a_claim_elsewhere_says_nothing(
    tmp_path: Path, on: Callable[[str], list[int]], what: str, takeover: str
) -> None:
    """Disks, and network file systems that keep locks, are looked at once and not talked about."""
    looks, seen = on(what), list[Event]()
    with CheckpointManager(tmp_path / "run", takeover=takeover, listeners=[seen.append]) as ckpts:
        assert warnings_of(ckpts, seen, 1) == []
    assert len(looks) == 1


def test_a_store_is_not_looked_for_among_the_mounts(on: Callable[[str], list[int]], memory_root: str) -> None:
    """What is no folder costs nothing."""
    looks, seen = on(NO_LOCK), list[Event]()
    with CheckpointManager(memory_root, takeover="refuse", listeners=[seen.append]) as ckpts:
        assert warnings_of(ckpts, seen, 1) == []
    assert looks == []


def test_only_one_writer_cannot_be_had_without_locks(tmp_path: Path, on: Callable[[str], list[int]]) -> None:
    """takeover="refuse" is refused there before anything is written, unless the user promises what locks cannot."""
    on("fuse.gcsfuse gcsfuse rw")
    ckpts = CheckpointManager(tmp_path / "run", takeover="refuse")
    with pytest.raises(UnsafeStorageError, match=r"takeover=\"refuse\" cannot keep .* single_writer=True") as refused:
        ckpts.save(1, {"w": torch.ones(3)})
    assert "Write the bucket's own URL" in str(refused.value)
    assert not (tmp_path / "run").exists()
    ckpts.close()
    seen: list[Event] = []
    with CheckpointManager(
        tmp_path / "run", takeover="refuse", single_writer=True, listeners=[seen.append]
    ) as promised:
        assert len(warnings_of(promised, seen, 1)) == 1


def test_the_doctor_does_not_like_locks_that_do_not_hold(tmp_path: Path, on: Callable[[str], list[int]]) -> None:
    """A mount option that keeps locks on this machine fails the check, and is named."""
    on(NO_LOCK)
    report = examine(str(tmp_path))
    (check,) = (check for check in report.checks if check.name == "file system")
    assert not check.ok
    assert "nolock" in check.detail


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
