"""The promises of ``storage.base`` as tests: every storage inherits them and is held to all of them.

One class in one file past 350 lines: a backend inherits one name, and gets the promises added later too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, ClassVar, TypeVar

import pytest

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Attesting, Buffer, Landed, Listed, Lost, Part, Storage
from cloudckpt.testing.sources import BytesSource

__all__ = ["StorageContract"]

_T = TypeVar("_T")

_LIMIT_BYTES = 1_000_000


class _BufferError(Exception):
    """What the caller's own iterator raises."""


def _landed(outcome: object) -> str:
    assert isinstance(outcome, Landed), outcome
    return outcome.version


def _put(storage: Storage, key: str, body: bytes) -> None:
    storage.put(key, [body], size_bytes=len(body))


def _body(storage: Storage, key: str) -> bytes:
    return storage.read(key, limit_bytes=_LIMIT_BYTES).body


def _range(storage: Storage, key: str, start: int, length: int) -> bytes:
    target = bytearray(length)
    storage.read_into(key, start, memoryview(target))
    return bytes(target)


def _range_in_the_end(storage: Storage, key: str, length: int) -> bytes:
    """The bytes, from a store that may ask to be asked again (moto does while an object is being replaced)."""
    while True:
        try:
            return _range(storage, key, 0, length)
        except StorageError as exc:
            if not exc.retryable:
                raise


def _keys(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(item.key for item in storage.list(prefix))


class StorageContract:
    """Inherit it in a test module as ``class TestMine(StorageContract)`` and give it a fixture ``storage``.

    The fixture gives an empty storage. ``second_storage`` is another instance over the same place, as another
    process would have it; override it wherever such a thing exists.

    Attributes:
        threads: how many threads take part in a race.
        odd_keys: keys that must survive the way to the store and back.
    """

    threads: ClassVar[int] = 8
    odd_keys: ClassVar[tuple[str, ...]] = (
        "a space/and another one",
        "plus+plus",
        "100%",
        "50%25",
        "über/日本語.bin",
        "snow\u2603/\U0001f600",
        "query?x=1&y=2",
        "fragment#1",
        "tilde~and^caret",
        "quote'and\"quotes",
        "semi;colon:comma,equals=at@",
        "(round)[square]{curly}",
        "...dots..and.dots",
        "-dash",
        "x" * 200,
    )

    @pytest.fixture
    def storage(self) -> Storage:
        """An empty storage; every subclass gives its own."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `storage`")

    @pytest.fixture
    def second_storage(self, storage: Storage) -> Storage:
        """Another instance over the same place; the same one where there is no such thing."""
        return storage

    def _at_once(self, work: Callable[[int], _T]) -> list[_T]:
        together = Barrier(self.threads)

        def one(number: int) -> _T:
            together.wait(timeout=60)
            return work(number)

        with ThreadPoolExecutor(self.threads) as pool:
            return [*pool.map(one, range(self.threads))]

    # -- what it is ------------------------------------------------------------------------------------------

    def test_it_has_the_shape_of_a_storage(self, storage: Storage) -> None:
        """It has every verb, and a URL without a trailing slash."""
        assert isinstance(storage, Storage)
        assert storage.url
        assert storage.url.endswith("://") or not storage.url.endswith("/")

    def test_a_new_storage_is_empty(self, storage: Storage) -> None:
        """Where nothing was written, nothing is listed and nothing can be read."""
        assert _keys(storage) == []
        with pytest.raises(ObjectNotFoundError):
            storage.read("manifest.json", limit_bytes=10)

    def test_close_is_idempotent(self, storage: Storage) -> None:
        """Closing twice is as good as closing once."""
        storage.close()
        storage.close()

    # -- create and replace ----------------------------------------------------------------------------------

    def test_create_lands_once(self, storage: Storage) -> None:
        """The first create lands; a second one is lost and changes nothing."""
        _landed(storage.create("manifest.json", b"first"))

        assert isinstance(storage.create("manifest.json", b"second"), Lost)
        assert _body(storage, "manifest.json") == b"first"

    def test_one_of_many_creates_lands(self, storage: Storage, second_storage: Storage) -> None:
        """Of creates that race, from two instances, exactly one lands, and its bytes are the ones that stay."""
        both = (storage, second_storage)
        outcomes = self._at_once(lambda n: both[n % 2].create("manifest.json", b"body %d" % n))

        winners = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Landed)]
        assert len(winners) == 1
        assert sum(isinstance(outcome, Lost) for outcome in outcomes) == self.threads - 1
        assert _body(storage, "manifest.json") == b"body %d" % winners[0]

    def test_create_after_delete_lands(self, storage: Storage) -> None:
        """What was deleted can be created again, and the version from before is stale."""
        old = _landed(storage.create("manifest.json", b"one"))
        assert storage.delete(["manifest.json"]) == {}

        assert isinstance(storage.replace("manifest.json", b"never", expecting=old), Lost)
        _landed(storage.create("manifest.json", b"two"))
        assert isinstance(storage.replace("manifest.json", b"never", expecting=old), Lost)
        assert _body(storage, "manifest.json") == b"two"

    def test_replace_lands_with_the_version_of_the_last_write(self, storage: Storage) -> None:
        """The version that a landed write gives is the condition for the next one."""
        version = _landed(storage.create("manifest.json", b"0"))
        for n in range(1, 5):
            version = _landed(storage.replace("manifest.json", b"%d" % n, expecting=version))

        assert _body(storage, "manifest.json") == b"4"

    def test_replace_lands_with_the_version_of_a_read(self, storage: Storage, second_storage: Storage) -> None:
        """The version that a read gives is the version of exactly the bytes it gave, in every instance."""
        written = _landed(storage.create("manifest.json", b"one"))
        found = second_storage.read("manifest.json", limit_bytes=100)

        assert (found.body, found.version) == (b"one", written)
        _landed(second_storage.replace("manifest.json", b"two", expecting=found.version))
        assert isinstance(storage.replace("manifest.json", b"three", expecting=written), Lost)
        assert _body(storage, "manifest.json") == b"two"

    def test_a_stale_replace_is_lost(self, storage: Storage) -> None:
        """A replace with a version from before the last write is lost and changes nothing."""
        old = _landed(storage.create("manifest.json", b"one"))
        new = _landed(storage.replace("manifest.json", b"two", expecting=old))

        assert old != new
        assert isinstance(storage.replace("manifest.json", b"three", expecting=old), Lost)
        assert _body(storage, "manifest.json") == b"two"

    def test_a_replace_of_nothing_is_lost(self, storage: Storage) -> None:
        """A replace of an object that is not there is lost and makes none."""
        assert isinstance(storage.replace("manifest.json", b"body", expecting="0"), Lost)
        assert _keys(storage) == []

    def test_versions_tell_bodies_apart(self, storage: Storage) -> None:
        """While A, B and C follow one another, the version of one is never taken for another's."""
        versions = [_landed(storage.create("manifest.json", b"A"))]
        for body in (b"B", b"C"):
            versions.append(_landed(storage.replace("manifest.json", body, expecting=versions[-1])))

        assert len(set(versions)) == 3
        for stale in versions[:-1]:
            assert isinstance(storage.replace("manifest.json", b"D", expecting=stale), Lost)

    def test_one_of_many_replaces_lands(self, storage: Storage, second_storage: Storage) -> None:
        """Of replaces that race under one version, exactly one lands, and its version is the current one."""
        both = (storage, second_storage)
        version = _landed(storage.create("manifest.json", b"start"))
        outcomes = self._at_once(lambda n: both[n % 2].replace("manifest.json", b"%d" % n, expecting=version))

        winners = [(n, outcome) for n, outcome in enumerate(outcomes) if isinstance(outcome, Landed)]
        assert len(winners) == 1
        found = storage.read("manifest.json", limit_bytes=100)
        assert (found.body, found.version) == (b"%d" % winners[0][0], winners[0][1].version)

    def test_no_increment_is_lost(self, storage: Storage, second_storage: Storage) -> None:
        """A counter that many threads raise by read and replace has counted every landed write."""
        both = (storage, second_storage)
        storage.create("manifest.json", b"0")

        def count(number: int) -> None:
            for _ in range(5):
                while True:
                    found = both[number % 2].read("manifest.json", limit_bytes=100)
                    body = b"%d" % (int(found.body) + 1)
                    if isinstance(both[number % 2].replace("manifest.json", body, expecting=found.version), Landed):
                        break

        self._at_once(count)
        assert int(_body(storage, "manifest.json")) == 5 * self.threads

    # -- read ------------------------------------------------------------------------------------------------

    def test_read_sees_the_newest_write(self, storage: Storage, second_storage: Storage) -> None:
        """A read after a write, also of another instance, sees that write and no cache."""
        version = _landed(storage.create("manifest.json", b"one"))
        assert _body(second_storage, "manifest.json") == b"one"
        storage.replace("manifest.json", b"two", expecting=version)
        assert _body(second_storage, "manifest.json") == b"two"

    def test_read_has_a_limit(self, storage: Storage) -> None:
        """An object of exactly the limit is read; one byte more is refused, which is not the same as missing."""
        _put(storage, "object", b"12345")

        assert storage.read("object", limit_bytes=5).body == b"12345"
        with pytest.raises(StorageError) as refused:
            storage.read("object", limit_bytes=4)
        assert not isinstance(refused.value, ObjectNotFoundError)
        assert not refused.value.retryable

    def test_what_is_missing_is_proven_missing(self, storage: Storage) -> None:
        """Every reading verb says of a missing object that it does not exist, and that waiting does not help."""
        _put(storage, "folder/object", b"12345")
        for key in ("nothing", "folder/nothing", "nothing/object", "folder", "folder/object/below"):
            asks: list[Callable[[str], object]] = [
                lambda key: storage.read(key, limit_bytes=10),
                lambda key: _range(storage, key, 0, 1),
                storage.size,
            ]
            for ask in asks:
                with pytest.raises(ObjectNotFoundError) as missing:
                    ask(key)
                assert not missing.value.retryable

    # -- put -------------------------------------------------------------------------------------------------

    def test_put_lays_buffers_end_to_end(self, storage: Storage) -> None:
        """Buffers of every kind, empty and typed ones included, become one object in their order."""
        whole = bytearray(range(64))
        typed: Any = memoryview(bytearray(range(64, 88))).cast("f", (2, 3))
        none_at_all: Any = memoryview(bytearray(8)).cast("d")[:0]
        buffers: list[Buffer] = [b"", whole[:3], memoryview(whole)[3:40], b"", bytes(whole[40:]), typed, none_at_all]

        storage.put("object", iter(buffers), size_bytes=88)

        assert _body(storage, "object") == bytes(range(88))

    def test_put_of_many_small_buffers(self, storage: Storage) -> None:
        """Buffers may be as many and as small as they like."""
        storage.put("object", (b"%02x" % (n % 256) for n in range(5_000)), size_bytes=10_000)

        assert _body(storage, "object") == b"".join(b"%02x" % (n % 256) for n in range(5_000))

    def test_put_of_nothing_makes_an_empty_object(self, storage: Storage) -> None:
        """An object of zero bytes is an object: it has a size, is listed, read and deleted."""
        storage.put("empty", [], size_bytes=0)

        assert storage.size("empty") == 0
        assert _body(storage, "empty") == b""
        assert _range(storage, "empty", 0, 0) == b""
        assert [*storage.list()] == [Listed("empty", 0)]
        assert storage.delete(["empty"]) == {}
        assert _keys(storage) == []

    def test_progress_adds_up(self, storage: Storage) -> None:
        """The numbers that progress is called with add up to the size."""
        told: list[int] = []
        storage.put("object", [b"a" * 1000, b"", b"b" * 70_000, b"c"], size_bytes=71_001, progress=told.append)

        assert sum(told) == 71_001
        assert min(told) >= 0

    @pytest.mark.parametrize("size", [1, 5_000, 300_001])
    def test_put_of_a_source(self, storage: Storage, size: int) -> None:
        """A payload that can be had by range becomes one object too, with progress that adds up."""
        whole = bytes(n % 251 for n in range(size))
        told: list[int] = []
        source = BytesSource(whole[: size // 3], b"", memoryview(whole)[size // 3 :])

        storage.put("folder/object", source, size_bytes=size, progress=told.append)

        assert _body(storage, "folder/object") == whole
        assert sum(told) == size

    @pytest.mark.parametrize("error", [_BufferError, KeyboardInterrupt])
    def test_a_source_that_fails_leaves_nothing(self, storage: Storage, error: type[BaseException]) -> None:
        """What a source raises when it is asked for its last bytes comes out as it was, and nothing is visible."""

        class Failing(BytesSource):
            @contextlib.contextmanager
            def hold(self, start: int, length: int) -> Iterator[Part]:
                if start + length == self.size_bytes:
                    raise error
                with super().hold(start, length) as part:
                    yield part

            def __iter__(self) -> Iterator[memoryview]:
                yield from [*super().__iter__()][:-1]
                raise error

        with pytest.raises(error):
            storage.put("object", Failing(bytes(300_000)), size_bytes=300_000)

        assert _keys(storage) == []

    def test_the_same_put_twice_is_harmless(self, storage: Storage, second_storage: Storage) -> None:
        """Repeating a put with the same bytes leaves the same object."""
        _put(storage, "object", b"bytes")
        _put(second_storage, "object", b"bytes")

        assert _body(storage, "object") == b"bytes"
        assert [*storage.list()] == [Listed("object", 5)]

    @pytest.mark.parametrize("before", [None, b"what was there"], ids=["new", "over another"])
    @pytest.mark.parametrize("exit_by", ["error", "interrupt", "too few", "too many", "progress"])
    def test_put_is_all_or_nothing(self, storage: Storage, exit_by: str, before: bytes | None) -> None:
        """However a put ends before its last buffer, nothing of it is visible, and what was there is untouched."""
        key = "checkpoint-1.0123abcd/model-00000-of-00001.safetensors"
        if before is not None:
            _put(storage, key, before)

        def buffers() -> Iterator[Buffer]:
            yield b"x" * 100_000
            yield b"y" * 100_000
            if exit_by == "error":
                raise _BufferError
            if exit_by == "interrupt":
                raise KeyboardInterrupt
            if exit_by != "too few":
                yield b"z" * (100_001 if exit_by == "too many" else 100_000)

        def progress(_: int) -> None:
            if exit_by == "progress":
                raise _BufferError

        expected = {"error": _BufferError, "progress": _BufferError, "interrupt": KeyboardInterrupt}
        with pytest.raises(expected.get(exit_by, StorageError)):
            storage.put(key, buffers(), size_bytes=300_000, progress=progress)

        if before is None:
            with pytest.raises(ObjectNotFoundError):
                storage.size(key)
            with pytest.raises(ObjectNotFoundError):
                storage.read(key, limit_bytes=_LIMIT_BYTES)
            assert _keys(storage) == []
        else:
            assert _body(storage, key) == before
            assert _keys(storage) == [key]
        _put(storage, key, b"again")
        assert _body(storage, key) == b"again"

    def test_put_replaces_as_a_whole(self, storage: Storage) -> None:
        """A reader beside a put sees one object or the other, never a mixture."""
        old, new = b"o" * 50_000, b"n" * 50_000
        _put(storage, "object", old)

        def work(number: int) -> set[bytes]:
            if number == 0:
                for body in (new, old) * 5:
                    _put(storage, "object", body)
                return set()
            return {_range_in_the_end(storage, "object", 50_000) for _ in range(10)}

        assert set[bytes]().union(*self._at_once(work)) <= {old, new}

    # -- ranges ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 1), (9, 1), (3, 4), (0, 0), (10, 0)])
    def test_read_into_gives_exactly_the_range(self, storage: Storage, start: int, length: int) -> None:
        """A range inside of the object fills the target and nothing beyond it."""
        _put(storage, "object", b"0123456789")
        target = bytearray(b"." * (length + 2))

        storage.read_into("object", start, memoryview(target)[1 : length + 1])

        assert bytes(target) == b"." + b"0123456789"[start : start + length] + b"."

    def test_read_into_fills_several_targets_in_turn(self, storage: Storage) -> None:
        """One range over several targets, empty ones among them; nothing beyond them changes."""
        _put(storage, "object", b"0123456789")
        targets = [bytearray(b"." * size) for size in (3, 0, 1, 4)]

        storage.read_into("object", 1, *[memoryview(target) for target in targets])

        assert targets == [b"123", b"", b"4", b"5678"]
        with pytest.raises(ObjectNotFoundError):
            storage.read_into("object", 3, *[memoryview(target) for target in targets])

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 1), (1000, 5)])
    def test_read_into_past_the_end_is_proven_missing(self, storage: Storage, start: int, length: int) -> None:
        """A range that ends after the object does not exist, and the answer says so."""
        _put(storage, "object", b"0123456789")

        with pytest.raises(ObjectNotFoundError):
            _range(storage, "object", start, length)

    def test_size_is_the_number_of_bytes(self, storage: Storage) -> None:
        """The size of an object, written either way, is what was written."""
        _put(storage, "folder/payload", b"x" * 12_345)
        storage.create("manifest.json", b"12")

        assert storage.size("folder/payload") == 12_345
        assert storage.size("manifest.json") == 2

    def test_what_is_attested_fits_what_was_put(self, storage: Storage) -> None:
        """A storage whose store keeps checksums tells size and sum of an object, or no sum; never another one."""
        if isinstance(storage, Attesting):
            _put(storage, "folder/payload", b"123456789")

            found = storage.attest("folder/payload")
            assert found.size_bytes == 9
            assert found.crc32c in {None, 0xE3069283}  # the check value of CRC-32C
            with pytest.raises(ObjectNotFoundError):
                storage.attest("folder/none")

    # -- list ------------------------------------------------------------------------------------------------

    def test_list_takes_a_prefix_of_the_key(self, storage: Storage) -> None:
        """A prefix is the beginning of a key as text; where its slashes are does not matter."""
        names = ["a", "ab", "a.b", "a/1", "a/2", "ab/1", "b/a/1", "b/a/deep/2", "c"]
        for key in names:
            _put(storage, key + ".x", b"1")

        for prefix in (
            "",
            "a",
            "a.",
            "a/",
            "ab",
            "ab/",
            "b",
            "b/a",
            "b/a/",
            "b/a/d",
            "b/a/deep/2.x",
            "z",
            "a/1.x/",
            "/",
        ):
            expected = sorted(key + ".x" for key in names if (key + ".x").startswith(prefix))
            assert _keys(storage, prefix) == expected, prefix

    def test_list_gives_sizes(self, storage: Storage) -> None:
        """Each key comes with its size, and comes once."""
        for n in range(4):
            _put(storage, f"folder/{n}", b"x" * n)

        assert sorted(storage.list("folder/"), key=lambda item: item.key) == [
            Listed(f"folder/{n}", n) for n in range(4)
        ]

    @pytest.mark.parametrize("limit", [0, 1, 3, 5, 6])
    def test_list_has_a_limit(self, storage: Storage, limit: int) -> None:
        """At most ``limit`` keys come, and as many as there are."""
        for n in range(5):
            _put(storage, f"folder-{n}/object", b"1")

        assert len([*storage.list("", limit=limit)]) == min(limit, 5)
        assert len([*storage.list("folder-3/", limit=limit)]) == min(limit, 1)

    def test_list_sees_every_write_at_once(self, storage: Storage, second_storage: Storage) -> None:
        """A listing after a write or a delete, also of another instance, shows it: there is no cache."""
        for n in range(3):
            _put(storage, f"folder/{n}", b"1")
            assert _keys(second_storage, "folder/") == [f"folder/{m}" for m in range(n + 1)]
        storage.delete(["folder/1"])
        assert _keys(second_storage, "folder/") == ["folder/0", "folder/2"]
        storage.create("manifest.json", b"1")
        assert "manifest.json" in _keys(second_storage)

    def test_list_while_others_come_and_go(self, storage: Storage) -> None:
        """A listing beside puts and deletes fails never, and shows whatever was there all the time."""
        for n in range(3):
            _put(storage, f"stays-{n}/object", b"1")

        def work(number: int) -> bool:
            if number % 2:
                for n in range(5):
                    _put(storage, f"goes-{number}/{n}", b"1")
                    storage.delete([f"goes-{number}/{n}"])
                return True
            seen = [_keys(storage) for _ in range(10)]
            return all({f"stays-{n}/object" for n in range(3)} <= {*found} for found in seen)

        assert all(self._at_once(work))
        assert _keys(storage) == [f"stays-{n}/object" for n in range(3)]

    # -- delete ----------------------------------------------------------------------------------------------

    def test_delete_takes_what_it_is_told(self, storage: Storage, second_storage: Storage) -> None:
        """The named keys are gone afterwards, the others are not, and nothing is left to report."""
        for n in range(6):
            _put(storage, f"folder/{n}", b"1")

        assert storage.delete(f"folder/{n}" for n in range(0, 6, 2)) == {}
        assert _keys(second_storage) == ["folder/1", "folder/3", "folder/5"]
        with pytest.raises(ObjectNotFoundError):
            storage.size("folder/0")

    def test_what_is_gone_counts_as_deleted(self, storage: Storage) -> None:
        """Deleting what never was, or twice, or below an object, is a success; so is deleting nothing."""
        _put(storage, "object", b"1")

        assert storage.delete([]) == {}
        assert storage.delete(["nothing", "no/thing", "object/below"]) == {}
        assert storage.delete(["object", "object"]) == {}
        assert storage.delete(["object"]) == {}
        assert _keys(storage) == []

    def test_delete_in_bulk(self, storage: Storage) -> None:
        """More keys than one request of any store can carry are one call."""
        there = [f"folder/{n}" for n in (0, 999, 1000, 1001, 2499)]
        for key in [*there, "folder/stays"]:
            _put(storage, key, b"1")

        assert storage.delete(f"folder/{n}" for n in range(2500)) == {}
        assert _keys(storage) == ["folder/stays"]

    def test_a_deleted_place_can_be_used_again(self, storage: Storage) -> None:
        """After the last object of a folder is gone, a put into the same folder works."""
        for n in range(3):
            _put(storage, "folder/object", b"%d" % n)
            assert _body(storage, "folder/object") == b"%d" % n
            storage.delete(["folder/object"])
        assert _keys(storage) == []

    def test_put_and_delete_race_in_one_folder(self, storage: Storage, second_storage: Storage) -> None:
        """Deletes that empty a folder never make a put into it fail, nor lose what it wrote."""
        both = (storage, second_storage)

        def work(number: int) -> None:
            for n in range(10):
                _put(both[number % 2], f"folder/{number}-{n}", b"1")
                assert both[number % 2].delete([f"folder/{number}-{n}"]) == {}
            _put(both[number % 2], f"folder/{number}", b"1")

        self._at_once(work)
        assert _keys(storage) == [f"folder/{number}" for number in range(self.threads)]

    def test_abort_uploads_leaves_objects_alone(self, storage: Storage) -> None:
        """Where no upload is unfinished none is aborted, and finished objects stay."""
        _put(storage, "folder/object", b"1")

        assert storage.abort_uploads("folder/") == 0
        assert _body(storage, "folder/object") == b"1"

    # -- keys and threads ------------------------------------------------------------------------------------

    def test_odd_keys_survive(self, storage: Storage) -> None:
        """Spaces, plus, percent signs, Unicode: a key comes back from every verb as it was given."""
        for n, key in enumerate(self.odd_keys):
            _put(storage, key, b"%d" % n)

        assert _keys(storage) == sorted(self.odd_keys)
        for n, key in enumerate(self.odd_keys):
            body = b"%d" % n
            assert _body(storage, key) == body
            assert storage.size(key) == len(body)
            assert _range(storage, key, 0, len(body)) == body
            assert _keys(storage, key) == [key]
        assert storage.delete(self.odd_keys) == {}
        assert _keys(storage) == []

    def test_odd_keys_under_conditions(self, storage: Storage) -> None:
        """Conditional writes take odd keys as well."""
        for key in ("a b+c%20.json", "ü.json"):
            version = _landed(storage.create(key, b"one"))
            assert isinstance(storage.create(key, b"never"), Lost)
            _landed(storage.replace(key, b"two", expecting=version))
            assert _body(storage, key) == b"two"

    def test_many_threads_at_once(self, storage: Storage) -> None:
        """Threads that use every verb of one instance at once get what each of them asked for."""

        def work(number: int) -> list[str]:
            prefix = f"thread-{number}/"
            bodies = {f"{prefix}{n}": bytes([number, n]) * 1000 for n in range(5)}
            for key, body in bodies.items():
                storage.put(key, [body[:7], body[7:]], size_bytes=len(body))
            for key, body in bodies.items():
                assert _range(storage, key, 3, 900) == body[3:903]
                assert storage.size(key) == len(body)
            assert _keys(storage, prefix) == sorted(bodies)
            assert storage.delete([f"{prefix}{n}" for n in range(4)]) == {}
            return _keys(storage, prefix)

        assert self._at_once(work) == [[f"thread-{n}/4"] for n in range(self.threads)]
