"""Payload from a source reaches the disk whole, by whichever way the file system and the memory allow.

(Past 350 lines: every way a disk can refuse one put is one list.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import pytest

from cloudckpt import Settings
from cloudckpt.errors import ConfigError, ObjectNotFoundError, SaveError, StorageError
from cloudckpt.storage import LocalStorage, Part, Source, local_calls, local_lane, local_write, open_storage
from cloudckpt.storage.body import NeverStopped
from cloudckpt.storage.local_calls import move, read_at

PAYLOAD = "checkpoint-1.0123abcd/model-00000-of-00001.safetensors"
TEMPORARY = "checkpoint-1.0123abcd/.model-00000-of-00001.safetensors.tmp"
PART = local_lane._PART_BYTES
MIB = 1024 * 1024


def memory(size: int, *, shift: int = 0) -> memoryview:
    """That many bytes, no two pages alike, which begin ``shift`` bytes after a page does."""
    whole = memoryview(mmap.mmap(-1, size + shift + 1))[shift : shift + size]
    whole[:] = random.Random(size).randbytes(size)
    return whole


class Views(NeverStopped):
    """A source over views of memory; counts what is held, and can fail at a part."""

    def __init__(self, *views: memoryview, fail_at: int = -1, error: BaseException | None = None) -> None:
        self.views = views
        self.held = self.most_held = self.holds = 0
        self.size_bytes = self.together_bytes = sum(map(len, views))
        self._fail_at = fail_at
        self._error = error
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        with self._mutex:
            self.holds += 1
            self.held += 1
            self.most_held = max(self.most_held, self.held)
        try:
            if start <= self._fail_at < start + length and self._error is not None:
                raise self._error
            views, at = [], 0
            for view in self.views:
                views.append(view[max(start - at, 0) : max(start + length - at, 0)])
                at += len(view)
            found = b"".join(views)
            yield Part(tuple(views), crc32c.crc32c(found))
        finally:
            with self._mutex:
                self.held -= 1

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.views)


def files(root: Path) -> list[str]:
    """Every file under a folder."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def put(storage: LocalStorage, source: Views, **words: Any) -> None:
    """Put a source where a payload object lies."""
    storage.put(PAYLOAD, source, size_bytes=source.size_bytes, **words)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStorage:
    """A storage that writes past the page cache, and one that does not."""
    return LocalStorage(tmp_path / "run", direct_io=request.param)


Written = list[tuple[bool, int, int]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Every positional write: whether past the page cache, where, and how many bytes."""
    log: Written = []
    real = os.pwritev

    def traced(descriptor: int, views: Sequence[memoryview], at: int) -> int:
        count = real(descriptor, views, at)
        log.append((bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT), at, count))
        return count

    monkeypatch.setattr(os, "pwritev", traced)
    return log


def direct_bytes(log: Written) -> int:
    """How many bytes went past the page cache."""
    return sum(count for is_direct, _, count in log if is_direct)


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    """A folder on a disk that can be written past the page cache."""
    probe = tmp_path / "probe"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            os.pwritev(descriptor, [memory(4096)], 0)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError):
        pytest.skip("this disk cannot be written past the page cache")
    probe.unlink()
    return tmp_path


# -- whole, whatever its size and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 64, 512], ids=lambda shift: f"shift{shift}")
@pytest.mark.parametrize(
    "size",
    [0, 1, 511, 4095, 4096, 4097, PART - 1, PART, PART + 1, 3 * PART + 4096, 3 * PART + 12_345],
)
def test_a_source_becomes_a_file(storage: LocalStorage, tmp_path: Path, size: int, shift: int) -> None:
    """Whatever its size and wherever its memory begins, the file has exactly the source's bytes, and nothing else is left."""
    source = Views(memory(size, shift=shift))

    put(storage, source)

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == source.views[0]
    assert files(tmp_path / "run") == [PAYLOAD]
    assert source.held == 0


def test_a_source_of_many_views_becomes_a_file(storage: LocalStorage, tmp_path: Path) -> None:
    """Thousands of views of odd sizes, empty and typed ones among them, are laid end to end."""
    whole = memory(2 * PART + 777)
    cuts = sorted({0, len(whole), PART, PART + 1, *random.Random(1).choices(range(len(whole)), k=5_000)})
    views = [whole[a:b] for a, b in itertools.pairwise(cuts)]

    put(storage, Views(*views[:7], whole[:0], *views[7:]))

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == whole


def test_typed_views_are_bytes(storage: LocalStorage, tmp_path: Path) -> None:
    """A part may hand out views of floats in two dimensions, as numpy would, and views without elements."""
    whole = memory(4096)

    class Typed(Views):
        @contextlib.contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            views: Any = (whole[:96].cast("f", (2, 12)), whole.cast("d")[:0], whole[96:])
            yield Part(views, 0)

    put(storage, Typed(whole))

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == whole


def test_the_tests_source_is_a_source() -> None:
    """What these tests put is what the storage takes for a source; a list of buffers is not."""
    assert isinstance(Views(memory(1)), Source)
    assert not isinstance([b"bytes"], Source)


def test_few_parts_are_held(storage: LocalStorage) -> None:
    """However large the source, no more parts are held at once than there are threads."""
    source = Views(memory(8 * PART))

    put(storage, source)

    assert source.holds == 8
    assert source.most_held <= local_lane._DIRECT_THREADS


def test_progress_comes_from_one_thread_at_a_time(storage: LocalStorage) -> None:
    """Progress adds up to the size, and is never called while it is being called."""
    inside = threading.Lock()
    told: list[int] = []

    def progress(count: int) -> None:
        assert inside.acquire(blocking=False)
        told.append(count)
        inside.release()

    put(storage, Views(memory(5 * PART + 1)), progress=progress)

    assert sum(told) == 5 * PART + 1


def test_puts_run_side_by_side(storage: LocalStorage, tmp_path: Path) -> None:
    """Several objects of one folder can be put at once."""
    sources = [Views(memory(2 * PART + n, shift=n)) for n in range(4)]

    def one(number: int) -> None:
        storage.put(f"checkpoint-1.0123abcd/{number}", sources[number], size_bytes=sources[number].size_bytes)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))

    for number, source in enumerate(sources):
        assert (tmp_path / "run" / "checkpoint-1.0123abcd" / str(number)).read_bytes() == source.views[0]


# -- the ways to the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 64])
def test_whole_blocks_go_past_the_page_cache(direct_folder: Path, written: Written, shift: int) -> None:
    """All but the last, broken block goes past the page cache, also from memory that is not aligned for it."""
    put(LocalStorage(direct_folder / "run"), Views(memory(2 * PART + 5000, shift=shift)))

    assert direct_bytes(written) == 2 * PART + 4096
    assert [(at, count) for is_direct, at, count in written if not is_direct] == [(2 * PART + 4096, 904)]


def test_direct_io_can_be_turned_off(tmp_path: Path, written: Written) -> None:
    """With ``direct_io=False`` everything goes through the page cache."""
    put(LocalStorage(tmp_path / "run", direct_io=False), Views(memory(2 * PART)))

    assert direct_bytes(written) == 0
    assert sum(count for _, _, count in written) == 2 * PART


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_to_open_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written, error: int
) -> None:
    """Where a file cannot be opened past the page cache, it is written through it, and nobody is told."""
    real = os.open

    def refuse(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    source = Views(memory(2 * PART + 5))
    put(LocalStorage(tmp_path / "run"), source)

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == source.views[0]
    assert direct_bytes(written) == 0


def test_a_file_system_that_refuses_to_write_directly(direct_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the refusal comes with a write, in the middle even, the part is written again through the page cache."""
    real = os.pwritev
    asked: list[int] = []

    def refuse(descriptor: int, views: Sequence[memoryview], at: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            asked.append(at)
            if at % PART:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, [views[0][: PART // 2]], at)
        return real(descriptor, views, at)

    monkeypatch.setattr(os, "pwritev", refuse)
    source = Views(memory(6 * PART + 5))
    put(LocalStorage(direct_folder / "run"), source)

    assert (direct_folder / "run" / PAYLOAD).read_bytes() == source.views[0]
    assert asked


def test_the_disk_begins_before_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes through the page cache is handed to the disk part by part, from a source and from buffers alike."""
    told: list[tuple[int, int]] = []
    for module in (local_lane, local_write):
        monkeypatch.setattr(module, "start_write_back", lambda _, start, length: told.append((start, length)))
    storage = LocalStorage(tmp_path / "run", direct_io=False)

    put(storage, Views(memory(2 * PART + 5)))
    assert sorted(told) == [(0, PART), (PART, PART), (2 * PART, 5)]

    told.clear()
    storage.put(PAYLOAD, (bytes(PART // 2) for _ in range(5)), size_bytes=5 * PART // 2)
    assert told == [(0, PART), (PART, PART)]


def test_a_system_without_these_calls(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without O_DIRECT, write-back, allocation, vectored calls (Windows, macOS) the file is the same, and is read."""
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(local_calls, "_linux", lambda *_: None)
    for name in ("pwritev", "preadv", "sysconf"):
        monkeypatch.delattr(os, name)
    source = Views(memory(2 * PART + 5))

    put(storage, source)

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == source.views[0]
    first, second = bytearray(10), bytearray(PART)
    storage.read_into(PAYLOAD, 3, memoryview(first), memoryview(second))
    assert first + second == source.views[0][3 : PART + 13]


def test_a_kernel_without_write_back_and_allocation(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel knows of neither, or the file system refuses them, it goes without."""

    def refusing(*_: int) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(local_calls, "_linux", lambda *_: refusing)
    source = Views(memory(2 * PART + 5))

    put(storage, source)

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == source.views[0]


def test_one_thread_is_enough(storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more threads can be started, as at the end of a process, the caller's own writes everything."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    source = Views(memory(3 * PART))
    put(storage, source)

    assert (tmp_path / "run" / PAYLOAD).read_bytes() == source.views[0]


# -- durable, or not there -----------------------------------------------------------------------------------


def test_every_byte_is_written_before_the_sync(
    storage: LocalStorage, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All writes of all threads end before the one fsync of the file; the rename follows it, then the folder's."""
    log: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def total() -> int:
        return sum(count for _, _, count in written)

    def traced_fsync(descriptor: int) -> None:
        log.append(("fsync", total()))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        log.append(("replace", total()))
        replace(source, target)

    put(storage, Views(memory(1)))  # makes the folder
    written.clear()
    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    size = 4 * PART + 9
    put(storage, Views(memory(size)))

    assert log == [("fsync", size), ("replace", size), ("fsync", size)]


@pytest.mark.parametrize("at", [0, PART, 5 * PART + 1], ids=["first", "second", "last"])
@pytest.mark.parametrize("error", [SaveError("changed"), OSError(errno.EIO, "theirs"), KeyboardInterrupt()], ids=repr)
def test_what_a_source_raises_is_its_own(storage: LocalStorage, tmp_path: Path, at: int, error: BaseException) -> None:
    """Whichever part and thread a source fails in, its error comes out as it was, and nothing is left or held."""
    source = Views(memory(5 * PART + 2), fail_at=at, error=error)
    before = set(threading.enumerate())

    with pytest.raises(type(error)) as raised:
        put(storage, source)

    assert raised.value is error
    assert files(tmp_path / "run") == []
    assert source.held == 0
    assert set(threading.enumerate()) <= before


def test_what_progress_raises_is_its_own(storage: LocalStorage, tmp_path: Path) -> None:
    """A progress that raises, in any thread, ends the put, and nothing is left."""

    def progress(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put(storage, Views(memory(4 * PART)), progress=progress)
    assert files(tmp_path / "run") == []


def test_a_source_of_another_size_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    """A source that is not as large as announced is refused before a byte of it is taken."""
    source = Views(memory(100))

    with pytest.raises(StorageError, match="100 bytes came, 101 were announced"):
        storage.put(PAYLOAD, source, size_bytes=101)
    assert source.holds == 0
    assert files(tmp_path / "run") == []


def test_a_part_of_another_size_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    """A source that hands out less than it was asked for makes no object with a hole in it."""

    class Short(Views):
        @contextlib.contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            with super().hold(start, length - 1) as part:
                yield part

    with pytest.raises(StorageError, match=rf"of {PART} bytes from \d+ on, {PART - 1} came"):
        put(storage, Short(memory(2 * PART)))
    assert files(tmp_path / "run") == []


KILLED = """
import contextlib, sys, threading
from cloudckpt.storage import LocalStorage, Part
from cloudckpt.storage.body import NeverStopped
PART = 8 * 1024 * 1024
class Stuck(NeverStopped):
    size_bytes = together_bytes = 4 * PART
    @contextlib.contextmanager
    def hold(self, start, length):
        if start == 2 * PART:
            print("stuck", flush=True)
        if start >= 2 * PART:
            threading.Event().wait()
        yield Part((memoryview(bytes(length)),), 0)
    def __iter__(self):
        return iter(())
LocalStorage(sys.argv[1]).put(sys.argv[2], Stuck(), size_bytes=4 * PART)
"""


@pytest.mark.processes
def test_a_kill_in_the_middle_leaves_only_the_temporary_file(tmp_path: Path) -> None:
    """A process killed while parts are under way has made nothing visible; a later put takes the file's place."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), PAYLOAD], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGKILL)

    storage = LocalStorage(tmp_path / "run")
    assert files(tmp_path / "run") == [TEMPORARY]
    with pytest.raises(ObjectNotFoundError):
        storage.size(PAYLOAD)

    put(storage, Views(memory(10)))
    assert files(tmp_path / "run") == [PAYLOAD]
    assert storage.size(PAYLOAD) == 10


# -- a full disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB; mounting one needs root."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("direct_io", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("allocates", [True, False], ids=["allocates", "finds out"])
def test_a_full_disk_is_named_and_left_empty(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, written: Written, direct_io: bool, allocates: bool
) -> None:
    """A source larger than the disk fails with advice and gives the space back; most file systems tell at once."""
    if not allocates:
        monkeypatch.setattr(local_lane, "allocate", lambda *_: None)
    storage = LocalStorage(small_disk / "run", direct_io=direct_io)

    with pytest.raises(StorageError, match="no space left on the device: free some, then save again") as refused:
        put(storage, Views(memory(24 * MIB)))

    assert PAYLOAD in str(refused.value)
    assert not refused.value.retryable
    assert files(small_disk / "run") == []
    assert bool(written) is not allocates
    put(storage, Views(memory(10 * MIB)))
    assert storage.size(PAYLOAD) == 10 * MIB


def test_a_disk_that_fills_under_buffers(small_disk: Path) -> None:
    """So does an object that comes in buffers, whose end nobody knows."""
    storage = LocalStorage(small_disk / "run")

    with pytest.raises(StorageError, match="no space left"):
        storage.put(PAYLOAD, (bytes(MIB) for _ in range(24)), size_bytes=24 * MIB)
    assert files(small_disk / "run") == []


LIMITED = """
import contextlib, resource, sys
from cloudckpt.storage import LocalStorage, Part
from cloudckpt.storage.body import NeverStopped
from cloudckpt.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
class Zeros(NeverStopped):
    size_bytes = together_bytes = 1 << 24
    @contextlib.contextmanager
    def hold(self, start, length):
        yield Part((memoryview(bytes(length)),), 0)
    def __iter__(self):
        return iter(())
try:
    LocalStorage(sys.argv[1]).put(sys.argv[2], Zeros(), size_bytes=1 << 24)
except StorageError as exc:
    print(exc)
"""


@pytest.mark.processes
def test_a_limit_of_the_file_size_is_named(tmp_path: Path) -> None:
    """Under ``ulimit -f`` the error says what limits the file, and nothing is left."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run"), PAYLOAD],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    assert "ulimit -f" in done.stdout
    assert PAYLOAD in done.stdout
    assert files(tmp_path / "run") == []


# -- reading -------------------------------------------------------------------------------------------------


def test_a_range_goes_into_thousands_of_targets(storage: LocalStorage) -> None:
    """One range fills more targets than one system call takes."""
    whole = memory(50_000)
    put(storage, Views(whole))
    targets = [bytearray(n % 23) for n in range(4_000)]
    length = sum(map(len, targets))

    storage.read_into(PAYLOAD, 17, *[memoryview(target) for target in targets])

    assert b"".join(targets) == whole[17 : 17 + length]


def test_ranges_are_read_side_by_side(storage: LocalStorage) -> None:
    """Threads that read ranges of one object at once each get their own."""
    whole = memory(4 * MIB)
    put(storage, Views(whole))

    def one(number: int) -> bool:
        target = bytearray(MIB // 4)
        storage.read_into(PAYLOAD, number * len(target), memoryview(target))
        return target == whole[number * len(target) : (number + 1) * len(target)]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(16)))


def test_a_file_cut_short_while_it_is_read_is_proven_missing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object that shrinks between the look at its size and the read is missing bytes, and is said to."""
    put(storage, Views(memory(1000)))
    real = os.preadv

    def cut(descriptor: int, views: Sequence[memoryview], at: int) -> int:
        return real(descriptor, [views[0][: 600 - at]], at) if at < 600 else 0

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ObjectNotFoundError, match="has 600 bytes"):
        storage.read_into(PAYLOAD, 0, memoryview(bytearray(1000)))


# -- the calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_a_call_that_moves_less_is_repeated(most: int) -> None:
    """However little a system call moves at a time, all bytes are moved once, each to its place."""
    views = [memoryview(text) for text in (b"abc", b"d", b"", b"efghij", b"k")]
    found = bytearray(12)

    def call(some: list[memoryview], at: int) -> int:
        taken = b"".join(some)[:most]
        found[at : at + len(taken)] = taken
        return len(taken)

    assert move(call, [view for view in views if view], 1) == 11
    assert found == b"\0abcdefghijk"


def test_a_read_ends_with_the_file(tmp_path: Path) -> None:
    """Where the file ends before the targets do, what there was is counted."""
    (tmp_path / "file").write_bytes(b"0123456789")
    targets = [bytearray(4), bytearray(4)]

    with (tmp_path / "file").open("rb") as file:
        assert read_at(file.fileno(), 5, [memoryview(target) for target in targets]) == 5
    assert targets[0] == b"5678"
    assert targets[1][:1] == b"9"


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_the_setting_reaches_the_disk(direct_folder: Path, written: Written, scheme: str, direct_io: bool) -> None:
    """``Settings(direct_io=...)`` decides for roots given as a path and as a URL."""
    storage = open_storage(f"{scheme}{direct_folder}/run", settings=Settings(direct_io=direct_io))
    source = Views(memory(PART))
    storage.put(PAYLOAD, source, size_bytes=PART)

    assert direct_bytes(written) == (PART if direct_io else 0)


@pytest.mark.parametrize("wrong", ["on", 1, None])
def test_a_setting_that_is_neither_is_refused(wrong: Any) -> None:
    """``direct_io`` is True or False; a word such as "on" is not guessed at."""
    with pytest.raises(ConfigError, match=r"direct_io=.*: write True or False"):
        Settings(direct_io=wrong)
