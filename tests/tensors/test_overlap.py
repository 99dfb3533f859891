"""Copies beside training are the state at the save, bit for bit, whatever training does meanwhile.

Everything is told on the CPU, and on a CUDA device where there is one. The copy is held back until training has
gone as far as it is allowed to, so that a missing wait shows.

(Past 350 lines: it is one table of what a training loop may do between a save and the next step.)
"""

from __future__ import annotations

import copy as python_copy
import functools
import gc
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import Optimizer, _global_optimizer_pre_hooks

from cloudckpt.errors import SaveError
from cloudckpt.tensors import overlap
from cloudckpt.tensors.memory import copy_bits
from cloudckpt.tensors.overlap import AT_ONCE_BYTES, Copying, Snapshot, begin, why_not
from cloudckpt.tensors.tree import flatten

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "SGD, fused": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "AdamW, foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "AdamW, one by one": functools.partial(torch.optim.AdamW, foreach=False, amsgrad=True),
    "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop, centered": functools.partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "LBFGS": functools.partial(torch.optim.LBFGS, max_iter=3),
}


class Trainer:
    """A small model that really trains, and a copy that is held back until ``step``."""

    def __init__(self, device: str, *make: Callable[..., Optimizer]) -> None:
        torch.manual_seed(0)
        self.device = device
        self.first, self.last = nn.Linear(192, 256), nn.Linear(256, 192)
        self.model = nn.Sequential(self.first, nn.BatchNorm1d(256), self.last).to(device)
        self.optimizers = [one(self.model.parameters()) for one in make or [torch.optim.AdamW]]
        self.go, self.stepped = threading.Event(), threading.Event()
        self.go.set()
        for _ in range(2):  # the state of an optimizer is made by its first step
            self.step()

    def backward(self) -> torch.Tensor:
        x = torch.randn(32, 192, device=self.device)
        loss = nn.functional.mse_loss(self.model(x), x)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss

    def step(self, optimizer: Optimizer | None = None) -> None:
        """One training step. The copy gets under way as it begins, and gives a step that does not wait the lead."""
        for one in [optimizer] if optimizer is not None else self.optimizers:

            def closure(one: Optimizer = one) -> torch.Tensor:
                one.zero_grad()
                return self.backward()

            closure()
            self.go.set()
            one.step(closure if isinstance(one, torch.optim.LBFGS) else None)  # type: ignore[arg-type]  # its float is a tensor
        self.stepped.set()

    def state(self, **more: Any) -> dict[str, torch.Tensor]:
        named = {f"optimizer{n}": one for n, one in enumerate(self.optimizers)}
        found = flatten({"model": self.model, **named, **more}).tensors
        return {f"{component}.{name}": t for component, tensors in found.items() for name, t in tensors.items()}

    def begin(
        self, state: Mapping[str, torch.Tensor], *, pin: bool = True, borrow_bytes: int = 0
    ) -> tuple[Snapshot, list[Copying]]:
        """Begin to copy, and hold it."""
        self.go.clear()
        self.stepped.clear()
        copies = [Copying(path=path, source=t, target=target_for(t, pin=pin)) for path, t in state.items()]
        if self.device == "cuda":
            with torch.cuda.stream(overlap._side_stream(torch.device("cuda", 0))):
                torch.cuda._sleep(400_000_000)  # type: ignore[no-untyped-call]  # about 0.2 s of the side stream alone
        return begin(copies, self.optimizers, copy=self._held, borrow_bytes=borrow_bytes), copies

    def _held(self, copying: Copying) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert self.go.wait(60)
            # No synchronising: a step that waits for the copy leaves this to run out, whatever the timing.
            self.stepped.wait(0.02)
        copy_bits(copying.target, copying.source)

    def close(self) -> None:
        self.go.set()


def target_for(tensor: torch.Tensor, *, pin: bool = True) -> torch.Tensor:
    """Host memory for a copy of it."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pin and tensor.is_cuda)


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of its elements, in order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The sums of tensors as they are now."""
    return {path: digest(t) for path, t in tensors.items()}


def staged(copies: Sequence[Copying]) -> dict[str, str]:
    """The sums of what was copied."""
    return {c.path: digest(c.target) for c in copies}


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    """Makes trainers whose held copies are let go at the end, so that a failed test does not hang."""
    made: list[Trainer] = []

    def make(device: str, *optimizers: Callable[..., Optimizer]) -> Trainer:
        made.append(Trainer(device, *optimizers))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., Trainer]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_staged_is_what_was_there_at_begin(trainer: Make, kind: str, device: str) -> None:
    """Each optimizer steps on, and the staged bytes are those at ``begin``, by SHA-256 of every tensor."""
    it = trainer(device, OPTIMIZERS[kind])
    state = it.state()
    assert why_not(it.optimizers, state.values()) is None
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.step()
    it.step()
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before
    now = digests(it.state())
    assert {path for path in before if now.get(path) != before[path]} >= {"model.0.weight", "model.2.weight"}


@pytest.mark.parametrize("device", DEVICES)
def test_accumulated_gradients(trainer: Make, device: str) -> None:
    """Several backwards run beside the copy; only the step waits for it."""
    it = trainer(device)
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    for _ in range(4):
        it.backward()
    assert not snapshot.done()
    it.step()
    snapshot.wait()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True], ids=["disjoint", "the same parameters"])
def test_several_optimizers(trainer: Make, device: str, *, shared: bool) -> None:
    """Whichever of several optimizers steps first, and over whatever parameters, it waits for its own."""
    first, second = torch.optim.AdamW, functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    it = trainer(device, first, second)
    if not shared:
        it.optimizers = [first(it.first.parameters(), fused=True), second(it.last.parameters())]
        it.step()
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    for optimizer in (*reversed(it.optimizers), *it.optimizers):
        it.step(optimizer)
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_is_not_in_the_state(trainer: Make, device: str, *, fused: bool) -> None:
    """Its step waits as well: also a fused one, whose writes move no version counter, made after ``begin``."""
    it = trainer(device)
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.step(torch.optim.AdamW(it.model.parameters(), lr=0.1, fused=fused))
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before
    assert digest(it.first.weight) != before["model.0.weight"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_scheduler_wraps_the_step(trainer: Make, device: str) -> None:
    """LR schedulers put a ``step`` of their own on the optimizer; it is seen through, and the hook is called."""
    it = trainer(device)
    scheduler = StepLR(it.optimizers[0], 1)
    state = it.state(scheduler=scheduler)
    assert why_not(it.optimizers, state.values()) is None
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.step()
    scheduler.step()
    snapshot.wait()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_optimizer_holds_is_copied_at_once(trainer: Make, device: str) -> None:
    """Buffers, an EMA and the RNG are staged when ``begin`` returns, and may change before the next step."""
    it = trainer(device)
    ema = swa_utils.AveragedModel(it.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))  # type: ignore[no-untyped-call]  # torch's own
    state = it.state(ema=ema, rng=torch.get_rng_state())
    before = digests(state)
    at_once = {path for path in before if path.startswith(("ema.", "rng", "model.1.running", "model.1.num"))}
    snapshot, copies = it.begin(state)
    assert {path: sum_ for path, sum_ in staged(copies).items() if path in at_once} == {p: before[p] for p in at_once}
    ema.update_parameters(it.model)
    it.backward()
    assert not snapshot.done()
    it.step()
    ema.update_parameters(it.model)
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_set_to_none(trainer: Make, device: str) -> None:
    """``zero_grad`` in the middle of the copy frees gradients, not weights, and is no change."""
    it = trainer(device)
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.backward()
    it.optimizers[0].zero_grad(set_to_none=True)
    it.model.zero_grad(set_to_none=False)
    it.step()
    snapshot.wait()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_scaler_that_skips_the_step(trainer: Make, device: str) -> None:
    """GradScaler leaves a step with infinite gradients out: no hook is called, and the copy ends by itself."""
    it = trainer(device)
    scaler = torch.amp.GradScaler(device)
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    scaler.scale(it.model(torch.full((4, 192), torch.inf, device=device)).sum()).backward()
    scaler.step(it.optimizers[0])
    scaler.update()
    it.go.set()
    snapshot.wait()
    assert staged(copies) == before
    assert digest(it.first.weight) == before["model.0.weight"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_raises(trainer: Make, device: str) -> None:
    """A step whose closure raises has waited all the same; the copy is exact and the next step runs."""
    it = trainer(device, OPTIMIZERS["LBFGS"])
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.go.set()

    def closure() -> float:
        with torch.no_grad():
            it.first.weight.zero_()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        it.optimizers[0].step(closure)
    it.step()
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
def test_two_in_a_row(trainer: Make, device: str) -> None:
    """A second copy may begin while the first is on its way; each is the state at its own ``begin``."""
    it = trainer(device)
    first_state = it.state()
    first_sums = digests(first_state)
    first, first_copies = it.begin(first_state)
    again, again_copies = it.begin(first_state)
    it.step()
    later_state = it.state()
    later_sums = digests(later_state)
    later, later_copies = it.begin(later_state)
    it.step()
    for snapshot in (later, again, first):
        snapshot.wait()
        snapshot.confirm()
    assert staged(first_copies) == staged(again_copies) == first_sums
    assert staged(later_copies) == later_sums != first_sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["AdamW, foreach", "AdamW, fused"])
def test_a_step_right_after_begin_is_never_reported(trainer: Make, kind: str, device: str) -> None:
    """Whatever the timing of hook and copy, a step that waited is no change under the copy."""
    it = trainer(device, OPTIMIZERS[kind])
    for _ in range(20):
        state = it.state()
        before = digests(state)
        copies = [Copying(path=path, source=t, target=target_for(t)) for path, t in state.items()]
        snapshot = begin(copies, it.optimizers)
        it.optimizers[0].step()
        snapshot.wait_copied()
        snapshot.confirm()
        assert staged(copies) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["parameter", "optimizer state"])
def test_a_change_that_nobody_announced_fails_by_name(trainer: Make, part: str, device: str) -> None:
    """A write to what is being copied, other than by a step, fails the save and names the tensor; training goes on."""
    it = trainer(device)
    weight = it.last.weight
    snapshot, _ = it.begin(it.state())
    with torch.no_grad():
        if part == "parameter":
            weight[0].add_(1)
        else:
            it.optimizers[0].state[weight]["exp_avg"].zero_()
    it.step()
    name = "model.2.weight" if part == "parameter" else r"optimizer0.state.*exp_avg"
    for look in (snapshot.wait, snapshot.wait_copied, snapshot.confirm):
        with pytest.raises(SaveError, match=rf"^{name}: changed while being copied"):
            look()
    it.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("look", ["wait", "wait_copied"])
def test_a_change_is_noticed_without_a_step(trainer: Make, look: str, device: str) -> None:
    """Training may end after the save: the look at the end of the copy finds the change, for whichever thread asks."""
    it = trainer(device)
    snapshot, _ = it.begin(it.state())
    with torch.no_grad():
        it.last.weight.mul_(2)
    it.go.set()
    with pytest.raises(SaveError, match=r"model\.2\.weight: changed"):
        getattr(snapshot, look)()


@pytest.mark.parametrize("device", DEVICES)
def test_weights_loaded_in_between(trainer: Make, device: str) -> None:
    """``model.load_state_dict`` writes into the parameters: the save fails, and names five of them at most."""
    it = trainer(device)
    other = python_copy.deepcopy(it.model.state_dict())
    snapshot, _ = it.begin(it.state())
    it.model.load_state_dict(other)
    it.step()
    # What is small is copied at once on the host, and beside the rest from a device.
    names = r"model\.0\.weight, model\.2\.weight" if device == "cpu" else r"model\.0\.weight, .* and 1 more"
    with pytest.raises(SaveError, match=rf"^{names}: changed"):
        snapshot.wait()


@pytest.mark.parametrize("device", DEVICES)
def test_optimizer_state_loaded_in_between(trainer: Make, device: str) -> None:
    """``optimizer.load_state_dict`` makes new tensors; what is being copied stays alive, and is exact."""
    it = trainer(device)
    state = it.state()
    before = digests(state)
    other = python_copy.deepcopy(it.optimizers[0].state_dict())
    snapshot, copies = it.begin(state)
    del state
    it.optimizers[0].load_state_dict(other)
    it.step()
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


def test_the_limit_writes_through_data_are_not_seen(trainer: Make) -> None:
    """The limit: ``.data`` has a version counter of its own. Written through before the next step, the copy is torn."""
    it = trainer("cpu")
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.last.weight.data.mul_(2)
    it.step()
    snapshot.wait()
    assert {path for path, sum_ in staged(copies).items() if sum_ != before[path]} == {"model.2.weight"}


@pytest.mark.parametrize("device", DEVICES)
def test_data_may_be_written_after_the_step(trainer: Make, device: str) -> None:
    """Clamping weights through ``.data`` after the step, as GANs do, comes after the copy."""
    it = trainer(device)
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.step()
    it.last.weight.data.clamp_(-0.01, 0.01)
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


def test_after_wait_anything_may_change(trainer: Make) -> None:
    """Whoever has waited, or has seen ``done()``, may write as he likes; the save that is still uploading is good."""
    it = trainer("cpu")
    for leave in ("wait", "done"):
        state = it.state()
        before = digests(state)
        snapshot, copies = it.begin(state)
        it.go.set()
        snapshot.wait_copied()
        if leave == "wait":
            snapshot.wait()
        else:
            assert snapshot.done()
        with torch.no_grad():
            it.last.weight.add_(0)
        it.step(torch.optim.SGD(it.model.parameters(), lr=0.0))
        snapshot.confirm()
        assert staged(copies) == before


def test_a_write_in_the_middle_when_the_copy_ends(trainer: Make) -> None:
    """Counters move at the end of a write: one that moves after the copy, with leave from nobody, is still found."""
    it = trainer("cpu")
    for finder in ("confirm", "step"):
        snapshot, _ = it.begin(it.state())
        it.go.set()
        snapshot.wait_copied()
        with torch.no_grad():
            it.last.weight.add_(0)
        if finder == "step":
            it.step()
        with pytest.raises(SaveError, match=r"model\.2\.weight: changed"):
            snapshot.confirm()


def test_waiting_has_an_end(trainer: Make) -> None:
    """A copy that is not over in time is a TimeoutError, and goes on."""
    it = trainer("cpu")
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    for wait in (snapshot.wait, snapshot.wait_copied):
        with pytest.raises(TimeoutError, match="still being copied after 0 s"):
            wait(0)
    assert not snapshot.done()
    it.go.set()
    snapshot.wait(60)
    assert snapshot.done()
    assert staged(copies) == before


def test_a_copy_that_fails(trainer: Make) -> None:
    """A copy that fails beside training fails the save with its cause; the step neither hangs nor raises."""
    it = trainer("cpu")
    good = it.first.weight.detach()
    bad = Copying(path="model.0.weight", source=good, target=torch.empty(3, 5))
    snapshot = begin([bad], it.optimizers)
    it.step()
    with pytest.raises(SaveError, match=r"copying the state beside training failed: .*size") as caught:
        snapshot.wait()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert overlap._live == ()


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_at_once_that_fails(trainer: Make, device: str) -> None:
    """A copy that is made at once raises from ``begin``, and nothing is under way afterwards."""
    it = trainer(device)
    state = it.state()
    copies = [Copying(path=path, source=t, target=target_for(t)) for path, t in state.items()]
    mean = state["model.1.running_mean"]
    wrong = Copying(path="model.1.running_mean", source=mean, target=torch.empty(7))
    with pytest.raises(RuntimeError, match="size"):
        begin([*copies, wrong], it.optimizers)
    assert overlap._live == ()
    it.step()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_dtypes(device: str) -> None:
    """Non-contiguous, overlapping in memory, narrow, complex and half tensors are staged bit for bit."""
    torch.manual_seed(0)
    base = torch.randn(300, 200, device=device)
    parts = [
        base.t(),
        torch.randn(40_000, device=device, dtype=torch.bfloat16).as_strided((199, 200), (200, 1)),
        torch.randn(200, 100, device=device, dtype=torch.complex64).conj(),
        torch.randn(200, 200, device=device).to(torch.float8_e4m3fn),
        torch.randn(400, 200, device=device)[::2, 10:150],
        torch.randn(1, 200, device=device).expand(200, 200),
    ]
    optimizer = torch.optim.SGD([{"params": [base]}], lr=0.1)
    optimizer.state[base] = {"parts": parts}
    copies = [Copying(path=str(n), source=t, target=target_for(t)) for n, t in enumerate([*parts, base])]
    before = {c.path: digest(c.source.view(torch.int8) if c.source.dtype.itemsize == 1 else c.source) for c in copies}
    snapshot = begin(copies, [optimizer])
    base.grad = torch.ones_like(base)
    optimizer.step()
    snapshot.wait()
    assert staged(copies) == before
    assert digest(base) != before["6"]


@pytest.mark.parametrize("device", DEVICES)
def test_empty_tensors_and_empty_states(trainer: Make, device: str) -> None:
    """Tensors without elements, and a state without tensors, are over at once."""
    it = trainer(device)
    empty = torch.empty(0, 3, device=device)
    for copies in ([], [Copying(path="x", source=empty, target=target_for(empty))]):
        snapshot = begin(copies, it.optimizers)
        assert snapshot.done()
        snapshot.wait()


def test_nothing_is_kept(trainer: Make) -> None:
    """When a snapshot is over it keeps neither optimizer nor tensors, and torch's table of hooks has not grown."""
    it = trainer("cpu")
    overlap.watch()
    hooks = dict(_global_optimizer_pre_hooks)
    snapshot, copies = it.begin(it.state())
    kept: list[weakref.ref[Any]] = [
        weakref.ref(it.optimizers[0]),
        weakref.ref(it.first.weight),
        *(weakref.ref(c.source) for c in copies),
    ]
    it.step()
    snapshot.wait_copied()
    assert not it.optimizers[0]._optimizer_step_pre_hooks
    it.optimizers, it.model, it.first, it.last = [], nn.Sequential(), nn.Linear(1, 1), nn.Linear(1, 1)
    del copies
    gc.collect()
    assert [reference for reference in kept if reference() is not None] == []
    assert dict(_global_optimizer_pre_hooks) == hooks
    assert overlap._live == ()
    snapshot.confirm()


def test_an_abandoned_snapshot_is_forgotten(trainer: Make) -> None:
    """A snapshot that nobody asks any more bothers no step."""
    it = trainer("cpu")
    snapshot, _ = it.begin(it.state())
    it.go.set()
    snapshot.wait_copied()
    assert [reference() for reference in overlap._live] == [snapshot]
    del snapshot
    gc.collect()
    assert [reference() for reference in overlap._live] == [None]
    it.step()
    begin([], it.optimizers)
    assert overlap._live == ()


def test_small_host_tensors_need_no_thread(trainer: Make) -> None:
    """An optimizer's step counts, on the host even when the weights are not, are staged when ``begin`` returns."""
    it = trainer("cpu")
    state = {path: t for path, t in it.state().items() if t.nbytes <= AT_ONCE_BYTES}
    assert any(path.endswith("step") for path in state)
    before = threading.enumerate()
    snapshot, copies = it.begin(state)
    assert snapshot.done()
    assert staged(copies) == digests(state)
    assert threading.enumerate() == before


def test_steps_in_another_thread(trainer: Make) -> None:
    """Optimizers of other threads step, wait and finish beside a save; none is disturbed, all copies are exact."""
    it = trainer("cpu")
    failures: list[BaseException] = []
    stop = threading.Event()

    def elsewhere() -> None:
        parameter = nn.Parameter(torch.ones(50_000))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.grad = torch.ones_like(parameter)
        try:
            while not stop.is_set():
                optimizer.step()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        for _ in range(8):
            state = it.state()
            before = digests(state)
            snapshot, copies = it.begin(state)
            it.step()
            snapshot.wait()
            assert staged(copies) == before
    finally:
        stop.set()
        it.go.set()
        thread.join()
    assert failures == []


COMPILED = [
    ("cpu", "compiled before", {"backend": "aot_eager"}),
    ("cpu", "compiled after", {"backend": "aot_eager"}),
    ("cpu", "in place", {"backend": "aot_eager"}),
    pytest.param("cuda", "compiled after", {"backend": "aot_eager"}, marks=needs_cuda),
    pytest.param("cuda", "compiled before", {}, marks=needs_cuda),
    pytest.param("cuda", "in place", {"mode": "reduce-overhead"}, marks=needs_cuda),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own, when it is first imported
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the compiler captures what holds no kernel
@pytest.mark.parametrize(("device", "how", "options"), COMPILED)
def test_a_compiled_step(trainer: Make, device: str, how: str, options: dict[str, str]) -> None:
    """A compiled step calls the hook as well: inside a function or in place, compiled before the first save or after."""
    it = trainer(device)
    optimizer = it.optimizers[0]
    plain = optimizer.step
    if how == "in place":
        compiled = optimizer.step = torch.compile(plain, **options)  # type: ignore[method-assign, call-overload]  # as users do
    else:
        compiled = torch.compile(lambda: plain(), **options)  # type: ignore[call-overload]  # options by name
    if how == "compiled before":
        it.backward()
        compiled()
    for _ in range(3):
        state = it.state()
        assert why_not([optimizer], state.values()) is None
        before = digests(state)
        snapshot, copies = it.begin(state)
        it.backward()
        it.go.set()
        compiled()
        it.stepped.set()
        snapshot.wait()
        snapshot.confirm()
        assert staged(copies) == before
        assert digest(it.first.weight) != before["model.0.weight"]
    torch.compiler.reset()


@needs_cuda
def test_the_host_does_not_wait_for_the_device(trainer: Make) -> None:
    """On CUDA the step is queued behind the copy: the host goes on while the copy has not even begun."""
    it = trainer("cuda", OPTIMIZERS["AdamW, fused"])
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    it.step()
    assert not snapshot.done()
    snapshot.wait()
    assert staged(copies) == before


@needs_cuda
def test_memory_that_is_not_pinned(trainer: Make) -> None:
    """Targets in ordinary memory are filled by a thread, and are exact."""
    it = trainer("cuda")
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state, pin=False)
    it.step()
    snapshot.wait()
    assert staged(copies) == before


@needs_cuda
@pytest.mark.parametrize("borrow_bytes", [300_000, 1 << 60])
@pytest.mark.parametrize("kind", ["AdamW, foreach", "AdamW, fused"])
def test_borrowed_device_memory(trainer: Make, kind: str, borrow_bytes: int) -> None:
    """What is first copied within the device is exact whatever is written next, also where nobody can see it."""
    it = trainer("cuda", OPTIMIZERS[kind])
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state, borrow_bytes=borrow_bytes)
    if borrow_bytes > 300_000:
        it.last.weight.data.mul_(2)
    it.step()
    it.step()
    assert not snapshot.done()
    snapshot.wait()
    snapshot.confirm()
    assert staged(copies) == before


@needs_cuda
def test_the_source_is_dropped_in_between(trainer: Make) -> None:
    """A model that is deleted while being copied keeps its memory until the copy is over."""
    it = trainer("cuda")
    state = it.state()
    before = digests(state)
    snapshot, copies = it.begin(state)
    copies = [Copying(path=c.path, source=c.target, target=c.target) for c in copies]
    it.optimizers, it.model, it.first, it.last = [], nn.Sequential(), nn.Linear(1, 1), nn.Linear(1, 1)
    del state
    gc.collect()
    scribble = [torch.full((256, 192), 7.0, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    del scribble
    snapshot.wait()
    assert staged(copies) == before


@needs_cuda
def test_a_step_captured_in_a_graph(trainer: Make) -> None:
    """A step that is captured while the copy is on its way fails the save by name; afterwards overlap is declined."""
    it = trainer("cuda", OPTIMIZERS["SGD, momentum"])
    overlap.watch()
    optimizer = it.optimizers[0]
    assert why_not([optimizer], []) is None
    it.backward()
    torch.cuda.synchronize()
    snapshot, _ = it.begin(it.state())
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Not torch.cuda.graph(...), which waits for the device, and so for the copy, before it begins.
        graph.capture_begin(capture_error_mode="thread_local")
        optimizer.step()
        graph.capture_end()
    with pytest.raises(SaveError, match=r"SGD\.step was captured in a CUDA graph"):
        snapshot.wait()
    graph.replay()
    assert "CUDA graph" in str(why_not([optimizer], []))
