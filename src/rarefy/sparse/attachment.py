"""An optimizer's steps, seen from outside: what is to happen before and after each of them, and inside its closure."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch._dynamo.disable imports the compiler, for seconds
from torch.optim import Optimizer

from rarefy.sparse.layers import local

#: Packages whose wrappers hand every call on to the optimizer inside, which has the hooks that they lack.
#: Opacus's makes the gradients in its own step, whole when it calls the one inside.
_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "opacus", "pytorch_lightning")


class Listener(Protocol):
    """What is done around the steps of one optimizer."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Those whose gradients it changes."""

    def lift(self) -> None:
        """Something is about to move the parameters that is no step."""

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
        for name in ("optimizer", "_optimizer", "original_optimizer"):
            inner = getattr(optimizer, name, None)
            if inner is not None and inner is not optimizer:
                return unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        hint = ""
        if isinstance(optimizer, (list, tuple)):
            hint = "; write attach(*optimizers)"
        elif isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            hint = "; give the one that it wraps, its .optimizer"
        elif package == "schedulefree":  # its wrapper averages outside the step of the optimizer that it holds
            hint = "; take one that is schedule-free by itself, such as AdamWScheduleFree or SGDScheduleFree"
        raise TypeError(
            "attach() takes the optimizers that train the model, each a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}{hint}"
        )
    return optimizer


class Attachment:
    """Calls a listener around the steps of an optimizer, until :meth:`remove`.

    Optimizers that it uses inside (SAM's, Lookahead's) are watched too, so that whichever step moves the weights is
    seen, and seen once. A closure is run on the weights that the optimizer is trying.
    """

    def __init__(self, optimizer: Optimizer, listener: Listener) -> None:
        self.optimizer, self.listener = optimizer, listener
        self.all = with_nested(optimizer)
        self._running: list[Optimizer] = []
        self._skipped = False
        self._undo: list[Callable[[], Any]] = []
        for each in self.all:
            # Of this one's step, not of its class: a scheduler may have wrapped it before the class was given hooks.
            if vars(each).get("_optimizer_step_pre_hooks") is not None and getattr(each.step, "hooked", False):
                self._undo.append(each.register_step_pre_hook(self._before).remove)
                self._undo.append(each.register_step_post_hook(lambda each, *_: self._after(each)).remove)
                self._wrap(each, "step", self._guard)
            else:  # a wrapper that never called Optimizer.__init__
                self._wrap(each, "step", self._step)
        for name in ("train", "eval") if has_modes(optimizer) else ():
            self._wrap(optimizer, name, self._move)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _wrap(self, optimizer: Optimizer, name: str, around: Callable[..., Any]) -> None:
        own, given = vars(optimizer).get(name), getattr(optimizer, name)

        @functools.wraps(given)
        def call(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return around(given, optimizer, *args, **kwargs) if self._undo else given(*args, **kwargs)

        wrapped = types.MethodType(call, optimizer)
        setattr(optimizer, name, wrapped)

        def undo() -> None:
            if vars(optimizer).get(name) is not wrapped:
                return  # a scheduler has wrapped it since: from here on it hands calls on
            delattr(optimizer, name)
            if own is not None:
                setattr(optimizer, name, own)

        self._undo.append(undo)

    def _step(self, given: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        changed = self._before(optimizer, (optimizer, *args), kwargs)
        given_args, given_kwargs = ((optimizer, *args), kwargs) if changed is None else changed
        result = self._guard(given, optimizer, *given_args[1:], **given_kwargs)
        self._after(optimizer)
        return result

    def _guard(self, given: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """A step that ends in an error, or is interrupted, leaves the weights used in the parameters too."""
        try:
            return given(*args, **kwargs)
        except BaseException:
            if self._running and self._running[0] is optimizer:
                self._running.clear()
                with torch.no_grad():
                    self.listener.look()
            raise

    def _move(self, given: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """A call that moves the weights without being a step: on the dense ones."""
        with torch.no_grad():
            self.listener.lift()
        try:
            return given(*args, **kwargs)
        finally:
            with torch.no_grad():
                self.listener.look()

    @_disable_dynamo
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if any(optimizer is running for running in self._running) and not _stepping_twice(optimizer):
            self._running.clear()  # the step before ended in an error
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
        # An optimizer may use the gradients that are there before it asks for others (SAM).
        gradients = _Gradients(self.listener.parameters())
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

    @_disable_dynamo
    def _after(self, optimizer: Optimizer) -> None:
        places = [place for place, running in enumerate(self._running) if running is optimizer]
        if not places:
            return
        del self._running[places[-1] :]
        if not self._running and not self._skipped:
            with torch.no_grad():
                self.listener.leave()


class _Gradients:
    """The gradients that a closure may go on adding to, as they were before they became those of the dense weights."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Of a shard its local part, which FSDP adds to without the distributed tensor's noticing.
        self._saved: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = [
            (parameter, grad, local(grad), local(grad).detach().clone())
            for parameter in parameters
            if (grad := parameter.grad) is not None
        ]
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


def has_modes(optimizer: object) -> bool:
    """Whether it moves the weights in ``train()`` and ``eval()``, as schedule-free optimizers do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def with_nested(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those in its attributes, in lists and dictionaries too, and in theirs."""
    found = [optimizer]
    for outer in found:
        for name, value in vars(outer).items():
            held: Any = [value]
            if isinstance(value, (list, tuple, dict)) and name not in ("state", "param_groups"):
                held = value.values() if isinstance(value, dict) else value
            found += [
                each for each in held if isinstance(each, Optimizer) and all(each is not known for known in found)
            ]
    return found


def _stepping_twice(optimizer: Optimizer) -> bool:
    """Whether a step of it is running inside a step of it: a subclass that calls ``super().step()``, both hooked."""
    code = Optimizer.profile_hook_step(Optimizer.step).__code__  # of what runs the hooks, the same for all classes
    frame, steps = inspect.currentframe(), 0
    while frame is not None:
        steps += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


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
