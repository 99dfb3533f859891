"""``transact``: what becomes of a write that landed, was lost, or got no answer. No test sleeps.

(Past 350 lines: every answer a store can give to one write, or not give, is one table.)
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

import pytest

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.manifest import note
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest
from cloudckpt.core.model import HISTORY_LENGTH, Manifest
from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    ConflictError,
    FencedError,
    FormatError,
    StorageError,
)
from cloudckpt.storage import (
    Listed,
    LocalStorage,
    Lost,
    ManifestStore,
    MemoryStorage,
    Outcome,
    Storage,
    Unknown,
    Versioned,
)
from cloudckpt.storage.retry import Backoff
from cloudckpt.testing import ScriptedStorage

AT = "2026-01-31T12:00:00.000Z"
RUN = "0123456789abcdef0123456789abcdef"
DEADLINE_S = 60.0


class Store(ManifestStore):
    """A manifest store whose pauses take no time: a clock that only they move."""

    def __init__(self, storage: Storage, **settings: float) -> None:
        self.time_s = 0.0
        self._tokens = itertools.count(random.Random(0).getrandbits(60) + id(self))
        super().__init__(
            storage,
            Settings(manifest_deadline_s=DEADLINE_S, storage_deadline_s=DEADLINE_S, **settings),  # type: ignore[arg-type]  # any
            clock=lambda: AT,
            token=lambda digits: f"{next(self._tokens):0{digits}x}"[-digits:],
        )

    def _backoff(self, deadline_s: float) -> Backoff:
        return Backoff(
            deadline_s=deadline_s, now=lambda: self.time_s, sleep=self._pause, uniform=lambda _low, high: high
        )

    def _pause(self, seconds: float) -> None:
        self.time_s += seconds


class Fate(Enum):
    """What becomes of a conditional write."""

    LAND = auto()
    ANSWER_LOST = auto()  #: it lands, and a timeout is all that is heard of it
    SAYS_LOST = auto()  #: it lands, is sent again below us, and the second answer is "precondition failed"
    REQUEST_LOST = auto()  #: it never arrives, and a timeout is all that is heard of it
    REFUSED = auto()  #: the store says no, and means it


class Flaky(ScriptedStorage):
    """A storage that treats conditional writes of the manifest as told, in order; afterwards they land."""

    def __init__(self, inner: Storage, *fates: Fate, forever: Fate = Fate.LAND) -> None:
        super().__init__(inner)
        self.sent: list[tuple[bytes, str | None]] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self._fates = [*fates]
        self._forever = forever

    def create(self, key: str, body: bytes) -> Outcome:
        if key != keys.MANIFEST:
            return super().create(key, body)
        return self._treat(body, None, lambda: ScriptedStorage.create(self, key, body))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        return self._treat(body, expecting, lambda: ScriptedStorage.replace(self, key, body, expecting=expecting))

    def _treat(self, body: bytes, expecting: str | None, send: Callable[[], Outcome]) -> Outcome:
        self.sent.append((body, expecting))
        fate = self._fates.pop(0) if self._fates else self._forever
        if fate is Fate.REFUSED:
            return Unknown(StorageError("403: no", retryable=False))
        answer = send() if fate is not Fate.REQUEST_LOST else None
        self.meanwhile()
        if fate is Fate.SAYS_LOST:
            return Lost("412")
        return answer if answer is not None and fate is Fate.LAND else Unknown(StorageError("timeout", retryable=True))


def new_run() -> Manifest:
    """What a run begins with."""
    return Manifest(run_id=RUN)


def count_up(manifest: Manifest, _: object = None) -> Manifest:
    """A change that is not idempotent, so that applying it twice shows."""
    return replace(manifest, next_seq=manifest.next_seq + 1)


def nothing(manifest: Manifest) -> None:
    """A decision that needs no facts."""


@pytest.fixture
def run(memory_storage: MemoryStorage) -> MemoryStorage:
    """A run at revision 1 that counts from 1."""
    Store(memory_storage).transact(lambda m, _: replace(m, updated_at=AT), prepare=nothing, new=new_run)
    return memory_storage


def stored(storage: Storage) -> Manifest:
    """The manifest as it lies there."""
    return decode_manifest(storage.read(keys.MANIFEST, limit_bytes=10**6).body)


def put_back(storage: Storage, manifest: Manifest) -> None:
    """Write a manifest as no process of ours would: without a condition."""
    body = encode_manifest(manifest)
    storage.put(keys.MANIFEST, [body], size_bytes=len(body))


def others_write(storage: Storage, times: int = 1) -> None:
    """Another process changes the run."""
    other = Store(storage)
    for _ in range(times):
        other.transact(lambda m, _: note(m, "other", at=AT), prepare=nothing)


# -- landed --------------------------------------------------------------------------------------------------


def test_a_new_run_is_created(memory_storage: MemoryStorage) -> None:
    """In an empty root the first change creates the manifest at revision 1, stamped with a write id."""
    storage = ScriptedStorage(memory_storage)
    written = Store(storage).transact(count_up, prepare=nothing, new=new_run)

    assert storage.counts() == {"read": 1, "list": 1, "create": 1}
    assert (written.revision, written.next_seq, written.updated_at) == (1, 2, AT)
    assert written.history == (written.write_id,)
    assert stored(memory_storage) == written


def test_the_steady_state_reads_nothing(run: MemoryStorage) -> None:
    """After the first read, each change is one conditional write and no GET."""
    storage = ScriptedStorage(run)
    store = Store(storage)
    store.read()
    storage.forget()
    for _ in range(10):
        store.transact(count_up, prepare=nothing)

    assert storage.counts() == {"replace": 10}
    assert (stored(run).revision, stored(run).next_seq) == (11, 11)
    assert store.last_seen == stored(run)


def test_history_remembers_a_bounded_number_of_writes(run: MemoryStorage) -> None:
    """The write ids are kept in order, the newest last, and no more than the format allows."""
    store = Store(run)
    ids = [store.transact(count_up, prepare=nothing).write_id for _ in range(HISTORY_LENGTH + 5)]

    assert len({*ids}) == len(ids)
    assert stored(run).history == tuple(ids[-HISTORY_LENGTH:])


def test_prepare_sees_the_manifest_that_is_changed(run: MemoryStorage) -> None:
    """What ``prepare`` finds out is handed to ``change`` together with the manifest it was found out about."""
    store = Store(run)
    store.transact(count_up, prepare=nothing)

    def change(manifest: Manifest, facts: int) -> Manifest:
        return replace(manifest, next_seq=manifest.next_seq + 10 * facts)

    assert store.transact(change, prepare=lambda m: m.next_seq).next_seq == 2 + 20


# -- nothing to do -------------------------------------------------------------------------------------------


def test_no_change_writes_nothing(run: MemoryStorage) -> None:
    """A change that gives back the same manifest writes nothing; it was asked about what is there now."""
    storage = ScriptedStorage(run)
    store = Store(storage)
    before = stored(run)

    assert store.transact(lambda m, _: m, prepare=nothing) == before
    assert storage.counts() == {"read": 1}
    assert store.transact(lambda m, _: m, prepare=nothing) == before
    assert storage.counts() == {"read": 2}
    assert stored(run) == before


def test_nothing_to_do_is_decided_on_what_is_there_now(run: MemoryStorage) -> None:
    """What looked done in the manifest this process remembers, but was undone by others, is done again."""
    store = Store(run)
    store.read()
    Store(run).transact(lambda m, _: replace(m, next_seq=9), prepare=nothing)

    written = store.transact(lambda m, _: m if m.next_seq == 1 else replace(m, next_seq=10), prepare=nothing)
    assert (written.next_seq, stored(run).next_seq) == (10, 10)


def test_a_refusal_is_decided_on_what_is_there_now(run: MemoryStorage) -> None:
    """What is wrong only in the manifest this process remembers is no error."""
    store = Store(run)
    store.read()
    others_write(run)

    def needs_a_journal(manifest: Manifest, _: None) -> Manifest:
        if not manifest.journal:
            raise CloudCkptError("there is no such event")
        return count_up(manifest)

    assert store.transact(needs_a_journal, prepare=nothing).next_seq == 2


def test_an_error_of_the_change_comes_out(run: MemoryStorage) -> None:
    """A change that refuses what is there now ends the transact with its own error; nothing is written."""
    storage = ScriptedStorage(run)
    store = Store(storage)
    store.read()

    def fenced(_: Manifest, __: None) -> Manifest:
        raise FencedError("replaced")

    with pytest.raises(FencedError, match="replaced"):
        store.transact(fenced, prepare=nothing)
    assert storage.counts() == {"read": 2}


# -- lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remembered", [True, False])
def test_a_lost_write_is_decided_again(run: MemoryStorage, *, remembered: bool) -> None:
    """If somebody else wrote first, the change is prepared and applied again upon what they wrote."""
    storage = Flaky(run)
    store = Store(storage)
    prepared: list[int] = []
    if remembered:
        store.read()
        others_write(run)

    def prepare(manifest: Manifest) -> None:
        prepared.append(manifest.revision)
        if len(prepared) == 1 and not remembered:
            others_write(run)

    written = store.transact(count_up, prepare=prepare)

    assert prepared == [1, 2]
    assert (written.revision, written.next_seq, len(written.journal)) == (3, 2, 1)
    assert stored(run) == written


@pytest.mark.parametrize("fate", [Fate.ANSWER_LOST, Fate.SAYS_LOST])
@pytest.mark.parametrize("others", [0, 1, 10, HISTORY_LENGTH - 1])
def test_our_own_write_is_recognised(run: MemoryStorage, fate: Fate, others: int) -> None:
    """A write whose answer was lost, or turned into "lost", is known by its id, however many came after it."""
    storage = Flaky(run, fate)
    storage.meanwhile = lambda: others_write(run, others)
    store = Store(storage)
    written = store.transact(count_up, prepare=nothing)

    assert len(storage.sent) == 1
    assert (stored(run).revision, stored(run).next_seq) == (2 + others, 2)
    assert written == stored(run) == store.last_seen


def test_a_write_that_history_forgot_is_applied_again(run: MemoryStorage) -> None:
    """After too many further writes nothing is recognised, and only idempotence by id helps: it is asked again."""
    storage = Flaky(run, Fate.ANSWER_LOST)
    storage.meanwhile = lambda: others_write(run, HISTORY_LENGTH)

    def once(manifest: Manifest, _: None) -> Manifest:
        return manifest if manifest.next_seq > 1 else count_up(manifest)

    Store(storage).transact(once, prepare=nothing)
    assert len(storage.sent) == 1
    assert stored(run).next_seq == 2


@pytest.mark.parametrize("fate", [Fate.ANSWER_LOST, Fate.SAYS_LOST])
def test_our_own_create_is_recognised(memory_storage: MemoryStorage, fate: Fate) -> None:
    """A run whose creation got no answer is ours if it holds our write id."""
    storage = Flaky(memory_storage, fate)
    written = Store(storage).transact(count_up, prepare=nothing, new=new_run)

    assert (written.revision, written.next_seq) == (1, 2)
    assert len(storage.sent) == 1


def test_a_run_that_somebody_else_made_first_is_used(memory_storage: MemoryStorage) -> None:
    """Of two processes that make a run at once, the second goes on with the first one's."""
    storage = Flaky(memory_storage)
    other = replace(new_run(), run_id="f" * 32)

    def prepare(manifest: Manifest) -> None:
        if manifest.run_id == RUN:
            Store(memory_storage).transact(count_up, prepare=nothing, new=lambda: other)

    written = Store(storage).transact(count_up, prepare=prepare, new=new_run)
    assert (written.run_id, written.revision, written.next_seq) == ("f" * 32, 2, 3)


# -- unknown -------------------------------------------------------------------------------------------------


def test_an_unanswered_write_is_sent_again_as_it_was(run: MemoryStorage) -> None:
    """While nothing changed, the same bytes go out under the same condition, so that one copy at most can land."""
    storage = Flaky(run, Fate.REQUEST_LOST, Fate.REQUEST_LOST)
    prepared: list[int] = []
    written = Store(storage).transact(count_up, prepare=lambda m: prepared.append(m.revision))

    assert len(storage.sent) == 3
    assert len({*storage.sent}) == 1
    assert prepared == [1]
    assert stored(run) == written


def test_an_unanswered_create_is_sent_again_as_it_was(memory_storage: MemoryStorage) -> None:
    """The same holds for the first write of a run."""
    storage = Flaky(memory_storage, Fate.REQUEST_LOST, Fate.REQUEST_LOST)
    Store(storage).transact(count_up, prepare=nothing, new=new_run)

    assert len({*storage.sent}) == 1
    assert storage.counts()["list"] == 1
    assert stored(memory_storage).next_seq == 2


def test_an_unanswered_write_upon_a_changed_manifest_is_decided_again(run: MemoryStorage) -> None:
    """If somebody wrote meanwhile and we are not in the history, our write can never land: decide again."""
    storage = Flaky(run, Fate.REQUEST_LOST)
    storage.meanwhile = lambda: others_write(run) if len(storage.sent) == 1 else None
    prepared: list[int] = []
    written = Store(storage).transact(count_up, prepare=lambda m: prepared.append(m.revision))

    assert prepared == [1, 2]
    assert len({*storage.sent}) == 2
    assert (written.revision, written.next_seq, len(written.journal)) == (3, 2, 1)


def test_no_answer_until_the_deadline_is_a_doubt(run: MemoryStorage) -> None:
    """At the deadline the doubt is raised as what it is, and nothing is deleted on it (I11)."""
    storage = Flaky(run, forever=Fate.REQUEST_LOST)
    store = Store(storage)
    with pytest.raises(CommitUnknownError, match=r"whether revision 2 .* landed \(timeout\)") as raised:
        store.transact(count_up, prepare=nothing, keep_copy=True)

    assert isinstance(raised.value.__cause__, StorageError)
    assert store.time_s == pytest.approx(DEADLINE_S)
    assert len({*storage.sent}) == 1
    assert storage.counts()["delete"] == 0
    assert storage.counts()["create"] == 0
    assert stored(run).revision == 1


def test_one_deadline_covers_the_reads_as_well(run: MemoryStorage) -> None:
    """A store that answers nothing at all costs one deadline, not one for each read in between."""

    class Silent(Flaky):
        def read(self, key: str, *, limit_bytes: int) -> Versioned:
            if self.sent:
                raise StorageError("silence", retryable=True)
            return super().read(key, limit_bytes=limit_bytes)

    store = Store(Silent(run, forever=Fate.REQUEST_LOST))
    with pytest.raises(CommitUnknownError, match="silence"):
        store.transact(count_up, prepare=nothing)
    assert store.time_s == pytest.approx(DEADLINE_S)


def test_the_write_after_a_doubt_finds_out(run: MemoryStorage) -> None:
    """Whether the doubtful write landed or not, the next one builds upon what is there."""
    for landed in (True, False):
        fate = Fate.ANSWER_LOST if landed else Fate.REQUEST_LOST
        before = stored(run).next_seq

        class Mute(Flaky):
            mute = False

            def read(self, key: str, *, limit_bytes: int) -> Versioned:
                if self.mute:
                    raise StorageError("silence", retryable=True)
                return super().read(key, limit_bytes=limit_bytes)

        storage = Mute(run, fate, forever=Fate.REQUEST_LOST)
        store = Store(storage)
        store.read()
        storage.mute = True
        with pytest.raises(CommitUnknownError):
            store.transact(count_up, prepare=nothing)
        storage.mute, storage._forever = False, Fate.LAND
        store.transact(lambda m, _: note(m, "next", at=AT), prepare=nothing)

        assert stored(run).next_seq == before + landed


def test_a_plain_refusal_is_no_doubt(run: MemoryStorage) -> None:
    """A store that said no, and shows an unchanged manifest, is believed at once: the refusal itself comes out."""
    storage = Flaky(run, Fate.REFUSED)
    store = Store(storage)
    with pytest.raises(StorageError, match="403: no"):
        store.transact(count_up, prepare=nothing)

    assert len(storage.sent) == 1
    assert store.time_s <= 0.1  # one pause, before the look that proves that nothing landed
    assert store.transact(count_up, prepare=nothing).next_seq == 2


def test_a_refusal_after_a_doubt_leaves_the_doubt(run: MemoryStorage) -> None:
    """If an earlier copy of the write may still be under way, a later "no" does not settle it."""
    storage = Flaky(run, Fate.REQUEST_LOST, forever=Fate.REFUSED)
    with pytest.raises(CommitUnknownError):
        Store(storage).transact(count_up, prepare=nothing)
    assert len({*storage.sent}) == 1


def test_a_root_that_cannot_be_written_says_so_at_once(memory_storage: MemoryStorage) -> None:
    """The first write of a run that the store refuses raises that refusal, without two minutes of tries."""
    store = Store(Flaky(memory_storage, forever=Fate.REFUSED))
    with pytest.raises(StorageError, match="403: no"):
        store.transact(count_up, prepare=nothing, new=new_run)
    assert store.time_s <= 0.1  # one pause, before the look that proves that nothing landed


def test_others_who_always_win_end_in_a_conflict(run: MemoryStorage) -> None:
    """If somebody else is faster until the deadline, that is a conflict and no doubt: nothing of ours is there."""
    storage = ScriptedStorage(run)
    store = Store(storage)
    with pytest.raises(ConflictError, match="other writers kept winning"):
        store.transact(count_up, prepare=lambda _: others_write(run))
    assert stored(run).next_seq == 1
    assert storage.counts()["delete"] == 0


# -- what is not there, or not what it was -------------------------------------------------------------------


#: What somebody did behind a process's back: the older manifest changed, writes upon it, and what is said of it.
BEHIND_ITS_BACK: dict[str, tuple[Callable[[Manifest], Manifest], int, str]] = {
    "put back": (lambda m: m, 0, "an older one was put back"),
    "put back and written upon": (lambda m: m, 3, "an older one was put back and written upon"),
    "replaced by another run": (lambda m: replace(m, run_id="f" * 32, revision=99), 0, "is now run f"),
    "replaced by a run of a lower id": (lambda m: replace(m, run_id="0" * 32, revision=99), 0, "is now run 0"),
}


@pytest.mark.parametrize("what", BEHIND_ITS_BACK)
@pytest.mark.parametrize("role", ["writer", "editor"])
def test_only_a_writer_refuses_a_run_that_went_back(run: MemoryStorage, role: str, what: str) -> None:
    """A writer stops when the run is not the one it wrote; an editor takes the run as it finds it."""
    change, times, says = BEHIND_ITS_BACK[what]
    store = Store(run)
    store.read()
    store.refuse_rollback = role == "writer"
    old = stored(run)
    for _ in range(2):
        store.transact(count_up, prepare=nothing)
    put_back(run, change(old))
    if times:
        others_write(run, times)
    there = stored(run)

    if role == "editor":
        assert store.transact(count_up, prepare=nothing).revision == there.revision + 1
        return
    for attempt in (store.read, lambda: store.transact(count_up, prepare=nothing)):
        with pytest.raises(ConflictError, match=says):
            attempt()
    assert stored(run) == there


def test_a_writer_accepts_what_others_wrote_upon_its_own(run: MemoryStorage) -> None:
    """A hundred edits of others upon a writer's own manifest are no rollback."""
    store = Store(run)
    store.read()
    store.refuse_rollback = True
    for times in (0, 1, HISTORY_LENGTH - 1, HISTORY_LENGTH, HISTORY_LENGTH + 1, 100):
        store.transact(count_up, prepare=nothing)
        others_write(run, times)
        assert store.read() == stored(run)


def test_a_run_that_went_back_late_in_its_life_is_found_out(run: MemoryStorage) -> None:
    """Past as many revisions as a manifest remembers, what was put back and written upon still lacks the last write."""
    store = Store(run)
    store.read()
    store.refuse_rollback = True
    for _ in range(HISTORY_LENGTH + 8):
        store.transact(count_up, prepare=nothing)
    old = stored(run)
    for _ in range(2):
        store.transact(count_up, prepare=nothing)
    put_back(run, old)
    others_write(run, 3)
    with pytest.raises(ConflictError, match="an older one was put back and written upon"):
        store.read()


def test_a_manifest_that_vanishes_stops_every_write(run: MemoryStorage) -> None:
    """A manifest deleted under a process is not made anew from memory: the error names repair."""
    store = Store(run)
    store.read()
    run.delete([keys.MANIFEST])

    for attempt in range(2):
        with pytest.raises(ConflictError, match=r"is gone: somebody deleted it .* cloudckpt repair memory://"):
            store.transact(count_up if attempt else lambda m, _: m, prepare=nothing)
    store.refuse_rollback = True
    with pytest.raises(ConflictError, match="was there and is gone"):
        store.read()
    assert [*run.list()] == []


@dataclass(frozen=True)
class Found:
    """What lies under a root without a manifest, and what is said about it; None: it is a new run."""

    keys: tuple[str, ...]
    says: str | None


PAYLOAD = "checkpoint-1.0123abcd/model-00000-of-00001.safetensors"
LEFTOVERS = {
    "nothing": Found((), None),
    "a probe": Found((".cloudckpt-probe-0123abcd",), None),
    "many probes and a swap": Found((*(f".cloudckpt-probe-0123abc{n}" for n in range(9)), keys.SWAP), None),
    "a checkpoint": Found((PAYLOAD,), "holds checkpoints .* run: cloudckpt repair memory://"),
    "a half put": Found(("checkpoint-1.0123abcd/.checkpoint.json.tmp",), "cloudckpt repair memory://"),
    "a copy": Found(("manifest-000020.json",), "cloudckpt repair memory://"),
    "a checkpoint behind probes": Found(
        (*(f".cloudckpt-probe-0123abc{n}" for n in range(9)), PAYLOAD), "cloudckpt repair memory://"
    ),
    "a checkpoint behind foreign files": Found(
        (*(f"a/{n}" for n in range(9)), PAYLOAD), "holds checkpoints .* cloudckpt repair memory://"
    ),
    "foreign files": Found(("notes.txt", "sub/data.csv"), "no run of ours .*'notes.txt'.* empty or new root"),
    "another tool's checkpoint": Found(("checkpoint-500/model.safetensors",), "no run of ours"),
    "foreign files behind a probe": Found((".cloudckpt-probe-0123abcd", "notes.txt"), "no run of ours"),
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_no_manifest_is_a_new_run_only_where_nothing_is(memory_storage: MemoryStorage, what: str) -> None:
    """Without a manifest, leftovers of ours name repair, foreign files say so, and nothing is changed."""
    for key in LEFTOVERS[what].keys:
        memory_storage.put(key, [b"1"], size_bytes=1)
    before = [*memory_storage.list()]
    says = LEFTOVERS[what].says

    if says is None:
        assert Store(memory_storage).read() is None
    else:
        for attempt in (
            Store(memory_storage).read,
            lambda: Store(memory_storage).transact(count_up, prepare=nothing, new=new_run),
        ):
            with pytest.raises(FormatError, match=says):
                attempt()
    assert [*memory_storage.list()] == before


def test_a_run_that_is_made_between_two_requests_is_found(memory_storage: MemoryStorage) -> None:
    """A run that another process makes after our read and before our listing is no leftover without a manifest."""

    class Meanwhile(ScriptedStorage):
        def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
            Store(memory_storage).transact(count_up, prepare=nothing, new=new_run)
            return super().list(prefix, limit=limit)

    assert Store(Meanwhile(memory_storage)).read() == stored(memory_storage)


def test_an_empty_root_costs_one_list(memory_storage: MemoryStorage) -> None:
    """Opening an empty root is one GET and one LIST."""
    storage = ScriptedStorage(memory_storage)
    Store(storage).read()
    assert storage.counts() == {"read": 1, "list": 1}


def test_a_lock_alone_is_an_empty_root(local_storage: LocalStorage) -> None:
    """On local disk a lock file that a crash left is no reason to refuse."""
    local_storage.create("manifest.json", b"1")
    local_storage.delete(["manifest.json"])
    assert Store(local_storage).read() is None


def test_a_missing_run_cannot_be_edited(memory_storage: MemoryStorage) -> None:
    """An edit of a run that does not exist makes none."""
    with pytest.raises(FormatError, match="holds no run yet"):
        Store(memory_storage).transact(count_up, prepare=nothing)
    assert [*memory_storage.list()] == []


@pytest.mark.parametrize("fault", ["truncated", "empty", "not ours", "newer"])
def test_a_manifest_that_cannot_be_read_is_refused(run: MemoryStorage, fault: str) -> None:
    """A truncated or foreign manifest names repair, one from the future names the upgrade; nothing is written."""
    body = run.read(keys.MANIFEST, limit_bytes=10**6).body
    changed = {
        "truncated": body[: len(body) // 2],
        "empty": b"",
        "not ours": b'{"name": "a web app"}',
        "newer": body.replace(b'"format": 1', b'"format": 2'),
    }[fault]
    store = Store(run)
    store.read()
    run.put(keys.MANIFEST, [changed], size_bytes=len(changed))

    advice = "upgrade cloudckpt" if fault == "newer" else r"No checkpoint was touched.*\n?.*cloudckpt repair memory://"
    for attempt in (
        Store(run).read,
        lambda: Store(run).transact(count_up, prepare=nothing, new=new_run),
        lambda: store.transact(count_up, prepare=nothing),
    ):
        with pytest.raises(FormatError, match=advice) as refused:
            attempt()
        assert ("repair" in str(refused.value)) == (fault != "newer")
    assert run.read(keys.MANIFEST, limit_bytes=10**6).body == changed


def test_a_feature_we_do_not_know_forbids_writing(run: MemoryStorage) -> None:
    """A run that requires an unknown feature is read and never written."""
    put_back(run, replace(stored(run), requires=("shared-bytes",)))
    storage = ScriptedStorage(run)
    store = Store(storage)
    found = store.read()

    assert found is not None
    assert found.requires == ("shared-bytes",)
    with pytest.raises(FormatError, match=r"needs shared-bytes, which this version does not know.*Upgrade cloudckpt"):
        store.transact(count_up, prepare=nothing)
    assert storage.counts() == {"read": 1}


def test_a_refused_read_is_no_new_run(run: MemoryStorage) -> None:
    """A 403 is reported as it is, and never taken for an empty root."""

    class Forbidden(ScriptedStorage):
        def read(self, key: str, *, limit_bytes: int) -> Versioned:
            super().read(key, limit_bytes=limit_bytes)
            raise StorageError("403", retryable=False)

    storage = Forbidden(run)
    for attempt in (
        Store(storage).read,
        lambda: Store(storage).transact(count_up, prepare=nothing, new=new_run),
    ):
        with pytest.raises(StorageError, match="403"):
            attempt()
    assert storage.counts() == {"read": 2}


# -- copies --------------------------------------------------------------------------------------------------


def copies(storage: Storage) -> list[str]:
    """The keys of the manifest copies that are there."""
    return [item.key for item in storage.list("manifest-")]


def test_every_twentieth_revision_is_copied_and_two_copies_stay(run: MemoryStorage) -> None:
    """Copies are of revisions 20, 40, …; each holds exactly what was written; the older ones go."""
    storage = ScriptedStorage(run)
    store = Store(storage, copy_every_revisions=20)
    seen: dict[int, list[str]] = {}
    for _ in range(85):
        written = store.transact(count_up, prepare=nothing)
        if written.revision % 20 == 0:
            copy = run.read(keys.manifest_copy(written.revision), limit_bytes=10**6).body
            assert copy == run.read(keys.MANIFEST, limit_bytes=10**6).body
            seen[written.revision] = copies(run)

    assert seen == {
        20: ["manifest-000020.json"],
        40: ["manifest-000020.json", "manifest-000040.json"],
        60: ["manifest-000040.json", "manifest-000060.json"],
        80: ["manifest-000060.json", "manifest-000080.json"],
    }
    assert stored(run).copies == (60, 80)
    assert storage.counts() == {"read": 1, "replace": 85, "create": 4, "delete": 2}


def test_a_copy_can_be_asked_for(run: MemoryStorage) -> None:
    """At close a copy is kept of whatever revision it is; it is named in the manifest before it is written."""
    storage = ScriptedStorage(run)
    Store(storage).transact(count_up, prepare=nothing, keep_copy=True)

    assert copies(run) == ["manifest-000002.json"]
    assert stored(run).copies == (2,)
    assert [call.verb for call in storage.calls] == ["read", "replace", "create"]


def test_a_copy_that_fails_is_harmless(run: MemoryStorage) -> None:
    """The copy serves repair only: whatever becomes of it and of the older ones, the write has landed."""

    class NoCopies(ScriptedStorage):
        def create(self, key: str, body: bytes) -> Outcome:
            return Unknown(StorageError("no"))

        def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
            raise StorageError("no")

    store = Store(NoCopies(run))
    for revision in range(2, 6):
        assert store.transact(count_up, prepare=nothing, keep_copy=True).revision == revision
    assert copies(run) == []


# -- a manifest that is put in place by a repair -----------------------------------------------------------------


@pytest.mark.parametrize("fate", [Fate.LAND, Fate.ANSWER_LOST, Fate.SAYS_LOST, Fate.REQUEST_LOST])
@pytest.mark.parametrize("over", [True, False], ids=["over another", "over nothing"])
def test_a_rebuilt_manifest_lands_once_whatever_is_heard_of_it(
    memory_storage: MemoryStorage, fate: Fate, over: bool
) -> None:
    """A request that never arrived is sent again; one that landed is recognised."""
    if over:
        Store(memory_storage).transact(count_up, prepare=nothing, new=new_run)
    storage = Flaky(memory_storage, fate)
    there = memory_storage.read(keys.MANIFEST, limit_bytes=10**6) if over else None
    written = Store(storage).rebuild(replace(new_run(), revision=7, next_seq=5), over=there)
    assert stored(memory_storage) == written
    assert written.next_seq == 5


def test_a_rebuilt_manifest_is_not_put_over_one_that_nobody_looked_at(run: MemoryStorage) -> None:
    """Somebody writes beside a repair: the repair is of what was, and is refused."""
    there = run.read(keys.MANIFEST, limit_bytes=10**6)
    storage = Flaky(run, Fate.REQUEST_LOST)
    storage.meanwhile = lambda: others_write(run)
    with pytest.raises(ConflictError):
        Store(storage).rebuild(replace(new_run(), revision=7), over=there)
    assert stored(run).revision < 7


def test_a_run_that_counts_past_what_can_be_read_is_not_written(run: MemoryStorage) -> None:
    """The next revision would be one that no reader takes: nothing is written, and the error says what to do."""
    put_back(run, replace(stored(run), revision=2**63 - 1))
    there = stored(run)
    with pytest.raises(FormatError, match=r"counts to 9223372036854775808.*cloudckpt repair"):
        Store(run).transact(count_up, prepare=nothing)
    assert stored(run) == there


def test_who_is_late_waits_for_nothing(run: MemoryStorage) -> None:
    """Before its time is up a process waits for no longer than it has, and afterwards not at all."""
    store = Store(run)
    most_s = store._patience_s
    assert most_s > 0
    store.hurry_until = time.monotonic() + 10**6
    assert store._patience_s == most_s
    store.hurry_until = time.monotonic() - 0.001
    assert store._patience_s == 0.0
