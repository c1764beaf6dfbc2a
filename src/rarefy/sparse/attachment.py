"""An optimizer's steps, seen from outside: what is to happen before and after each of them, and inside its closure."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from rarefy.sparse.layers import local

#: Packages whose wrappers hand every call on to the optimizer inside, which has the hooks that they lack.
_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


class Listener(Protocol):
    """What is done around the steps of one optimizer."""

    def enter(self) -> None:
        """The gradients are whole, and the optimizer is about to move the parameters."""

    def look(self) -> None:
        """The optimizer has put the parameters where it wants the loss (a closure)."""

    def leave(self) -> None:
        """The optimizer has moved the parameters."""


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of trainers. Raises TypeError for what is none, ValueError for DeepSpeed's."""
    if type(optimizer).__name__.startswith("DeepSpeed") or type(optimizer).__module__.startswith("deepspeed"):
        raise ValueError(
            f"{type(optimizer).__name__} keeps the weights in buffers of its own, which a sparsifier cannot reach; "
            "train with DDP or FSDP2 (fully_shard) and an optimizer of torch.optim"
        )
    package = type(optimizer).__module__.partition(".")[0]
    if package in _WRAPPERS:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
        if inner is not None and inner is not optimizer:
            return unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "attach() takes the optimizers that train the model, each a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}"
        )
    return optimizer


class Attachment:
    """Calls a listener around the steps of an optimizer, until :meth:`remove`.

    Optimizers that it uses inside (SAM's, Lookahead's) are watched too, so that whichever step moves the weights is
    seen, and seen once. A closure is run on the weights that the optimizer is trying.
    """

    def __init__(self, optimizer: Optimizer, listener: Listener) -> None:
        self.optimizer, self.listener = optimizer, listener
        self.all = list(_with_nested(optimizer))
        self._running: list[Optimizer] = []
        self._skipped = False
        self._undo: list[Callable[[], Any]] = []
        for each in self.all:
            if vars(each).get("_optimizer_step_pre_hooks") is not None and getattr(type(each).step, "hooked", False):
                self._undo.append(each.register_step_pre_hook(self._before).remove)
                self._undo.append(each.register_step_post_hook(lambda each, *_: self._after(each)).remove)
            else:  # a wrapper that never called Optimizer.__init__
                self._wrap(each, "step", self._step)
        for name in ("train", "eval"):  # schedule-free optimizers move the weights in these
            if callable(getattr(optimizer, name, None)):
                self._wrap(optimizer, name, self._move)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _wrap(self, optimizer: Optimizer, name: str, around: Callable[..., Any]) -> None:
        given = getattr(optimizer, name)

        def call(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return around(given, optimizer, *args, **kwargs) if self._undo else given(*args, **kwargs)

        wrapped = types.MethodType(call, optimizer)
        setattr(optimizer, name, wrapped)

        def undo() -> None:
            if vars(optimizer).get(name) is wrapped:
                delattr(optimizer, name)

        self._undo.append(undo)

    def _step(self, given: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        changed = self._before(optimizer, (optimizer, *args), kwargs)
        given_args, given_kwargs = ((optimizer, *args), kwargs) if changed is None else changed
        result = given(*given_args[1:], **given_kwargs)
        self._after(optimizer)
        return result

    def _move(self, given: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """A call that moves the weights without being a step: on the dense ones, whose gradients stay as they are."""
        gradients = _Gradients(optimizer)
        with torch.no_grad():
            self.listener.enter()
        gradients.changed()
        result = given(*args, **kwargs)
        with torch.no_grad():
            self.listener.look()
        gradients.restore()
        return result

    @torch._dynamo.disable
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if any(optimizer is running for running in self._running):  # the step before ended in an error
            self._running.clear()
        self._running.append(optimizer)
        if len(self._running) > 1:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._running.clear()
            raise RuntimeError(
                "a step that moves the masks cannot be captured in a CUDA graph, which would replay this one forever: "
                "capture forward and backward, and call optimizer.step() outside the graph"
            )
        self._skipped = _skips(optimizer)
        if self._skipped:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            with torch.no_grad():
                self.listener.enter()
            return None
        gradients = _Gradients(optimizer)
        with torch.no_grad():
            self.listener.enter()
        gradients.changed()

        def evaluate(*given: Any, **named: Any) -> Any:
            gradients.restore()
            with torch.no_grad():
                self.listener.look()
            result = closure(*given, **named)
            with torch.no_grad():
                self.listener.enter()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    @torch._dynamo.disable
    def _after(self, optimizer: Optimizer) -> None:
        if not self._running or self._running[0] is not optimizer:
            return
        self._running.clear()
        if not self._skipped:
            with torch.no_grad():
                self.listener.leave()


class _Gradients:
    """The gradients that a closure may go on adding to, as they were before they became those of the dense weights."""

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Of a shard its local part, which FSDP adds to without the distributed tensor's noticing.
        self._saved = [(p, p.grad, local(p.grad), local(p.grad).detach().clone()) for p in parameters]
        self._versions: list[int] = []

    def changed(self) -> None:
        """They are those of the dense weights from here on."""
        self._versions = [mine._version for _, _, mine, _ in self._saved]

    def restore(self) -> None:
        """Put back, once, those that nobody has touched since."""
        for (parameter, grad, mine, saved), version in zip(self._saved, self._versions, strict=True):
            if parameter.grad is grad and mine._version == version:
                mine.detach().copy_(saved)
        self._saved, self._versions = [], []


def _with_nested(optimizer: Optimizer, seen: tuple[Optimizer, ...] = ()) -> Iterator[Optimizer]:
    yield optimizer
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and not any(inner is other for other in (*seen, optimizer)):
            yield from _with_nested(inner, (*seen, optimizer))


def _skips(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has this step skipped inside the optimizer (fused ones); otherwise unscale for it.

    A scaler hands scaled gradients and what it found to optimizers that can deal with them. Here they are unscaled
    before, as for all other optimizers, which takes the same one look at the device.
    """
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found is not None and bool(found > 0):
        return True
    if scale is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, float(1.0 / scale))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    return False
