"""When copies beside training are declined, and in which words."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from cloudckpt.tensors.overlap import covered, why_not


def adam(**options: Any) -> torch.optim.Adam:
    """An optimizer as torch made it."""
    return torch.optim.Adam([nn.Parameter(torch.ones(3))], **options)


def scheduled() -> torch.optim.Optimizer:
    """Two schedulers have wrapped its step."""
    optimizer = adam()
    CosineAnnealingLR(optimizer, 10)
    OneCycleLR(optimizer, 0.1, 10)
    return optimizer


def compiled() -> torch.optim.Optimizer:
    """Its step is compiled in place."""
    optimizer = adam()
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]  # as users do
    return optimizer


def subclassed() -> torch.optim.Optimizer:
    """Its class has a step of its own."""

    class Mine(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Mine([nn.Parameter(torch.ones(3))])


def bound_again() -> torch.optim.Optimizer:
    """Its step was taken off and put back, as accelerate does."""
    optimizer = adam()
    optimizer.step = types.MethodType(type(optimizer).step, optimizer)  # type: ignore[method-assign]  # as users do
    return optimizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own, when it is first imported
@pytest.mark.parametrize("make", [adam, scheduled, compiled, subclassed, bound_again])
def test_steps_that_are_seen(make: Callable[[], torch.optim.Optimizer]) -> None:
    """A step that ends in the class's own, however wrapped by those who say what they wrap, is seen coming."""
    optimizer = make()
    assert why_not([optimizer], [torch.ones(3)]) is None


def not_an_optimizer() -> object:
    """It only looks like one."""
    return types.SimpleNamespace(step=lambda: None, param_groups=[])


def replaced() -> object:
    """Somebody put another step in its place."""
    optimizer = adam()
    optimizer.step = lambda: None  # type: ignore[assignment, method-assign, misc]  # as users do
    return optimizer


def without_hooks() -> object:
    """A wrapper that skips torch's own constructor, which adds the hooks."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            self.param_groups = inner.param_groups
            self.state = inner.state

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    return Wrapper(adam())


def capturable() -> object:
    """It is meant for CUDA graphs."""
    # Only CUDA tensors may be stepped so; the flag alone says what is meant.
    optimizer = adam()
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


def steps_in_backward() -> object:
    """It steps while gradients are still being computed."""
    optimizer = adam()
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    return optimizer


DECLINED: list[tuple[Callable[[], object], str]] = [
    (not_an_optimizer, "SimpleNamespace is no torch.optim.Optimizer: its steps call no hook"),
    (replaced, "the step of Adam was replaced by one that does not go through torch's step hooks"),
    (without_hooks, "the step of without_hooks.<locals>.Wrapper was replaced by one that does not go through"),
    (
        capturable,
        "the step of Adam can be (or was) captured in a CUDA graph (capturable=True), and replays call no hook",
    ),
    (
        steps_in_backward,
        "a parameter of Adam has a post-accumulate-grad hook, which may step in the middle of backward",
    ),
]


@pytest.mark.parametrize(("make", "words"), DECLINED, ids=[make.__name__ for make, _ in DECLINED])
def test_steps_that_are_not_seen(make: Callable[[], object], words: str) -> None:
    """One optimizer whose step cannot be seen coming is enough to decline, and it is named."""
    assert words in str(why_not([adam(), make()], [torch.ones(3)]))


def test_nothing_to_go_by() -> None:
    """Without an optimizer in the state nothing tells when weights change, and everything is copied at once."""
    assert "no torch optimizer" in str(why_not([], [torch.ones(3)]))


def test_other_devices() -> None:
    """Tensors elsewhere than on the CPU and on CUDA devices are copied at once."""
    assert "tensors on meta" in str(why_not([adam()], [torch.ones(3), torch.ones(3, device="meta")]))


def test_a_learning_rate_that_is_a_tensor_is_not_covered() -> None:
    """Schedulers write to it between steps, so it is copied at once wherever it lies, and never waited for."""
    rate, weight = torch.tensor(0.5), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=rate, foreach=False)
    assert [*covered([optimizer])] == [weight.untyped_storage()._cdata]


def test_what_is_covered() -> None:
    """An optimizer covers the memory of its parameters and its state, as views and detached tensors share it."""
    base, other = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([base], lr=0.1, momentum=0.5)
    assert [*covered([optimizer])] == [base.untyped_storage()._cdata]  # before its first step it has no state
    (base.sum() + other.sum()).backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    momentum = optimizer.state[base]["momentum_buffer"]

    def is_covered(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in covered([optimizer])

    assert [is_covered(t) for t in (base, base.detach(), base[2:4].t(), base.data, momentum)] == [True] * 5
    assert base.grad is not None
    assert [is_covered(t) for t in (other, base.grad, base.detach().clone(), torch.empty(0))] == [False] * 4
