"""The contract of every method, written once: what it is asked, and when. The model stays plain.

Everything happens around optimizer steps::

    before a step   the gradient, dL/dW^, becomes dL/dW in place;  the parameters become W, the dense weights
    the step        is the optimizer's own
    after it        W is taken from the parameters, the method moves, and the parameters become W^, the weights used

So between two steps the parameters are the weights used, zeros included, and evaluating, saving, averaging, compiling
and sharding the model need nothing from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.sparse.attachment import Attachment
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import Budget


class Method(ABC):
    """What :class:`rarefy.sparse.Sparsifier` asks of the families of methods, and where it stands.

    What a single method overrides beside its formula has no underscore and is described there.
    """

    total_steps: int
    steps: int
    interval: int

    _buckets: list[Bucket]
    _parts: list[Part]

    #: The first weights, until it is known which layers take part.
    _initial: list[Tensor] | None

    # At the beginning

    def _check_shapes(self) -> None:  # noqa: B027
        """Raise ValueError for layers whose shapes, or parts on the processes, the method cannot work on."""

    def _floors(self) -> float | Mapping[str, float]:
        return 0.0

    def _make_budget(self) -> Budget | None:
        return None

    def _relayer(self) -> None:  # noqa: B027
        """What a method derives from its layers, made again when they have become fewer."""

    @abstractmethod
    def _begin(self) -> None:
        """Make what the method keeps, in every bucket, from the dense weights that the parameters hold."""

    # Around a step, in this order

    def _changed(self, bucket: Bucket) -> bool:
        """Take in weights that somebody else has written since the last step; whether they differ from ours."""
        return False

    @abstractmethod
    def _lift(self, bucket: Bucket) -> None:
        """The parameters become W, and nothing else."""

    @abstractmethod
    def _before(self, bucket: Bucket) -> None:
        """The gradients become those of the dense weights, and of what the method learns; the parameters become W."""

    def _learn(self, bucket: Bucket) -> None:
        """A step of what the method learns, where there is a gradient for it."""
        grads = [parameter.grad for parameter in bucket.own.values() if parameter.grad is not None]
        for grad in grads:
            # What is learned outlives a batch of NaN, as good weights that are loaded after it ask for.
            grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if bucket.companion is not None and grads:
            bucket.companion.step()

    @abstractmethod
    def _update(self) -> None:
        """What the method does after an optimizer step; up to and with the last of ``total_steps``."""

    @abstractmethod
    def _take(self, bucket: Bucket) -> None:
        """Take W from the parameters, where ``bucket.dense``."""

    @abstractmethod
    def _show(self, bucket: Bucket) -> None:
        """The parameters become W^; takes W from them before, where ``bucket.dense``."""

    def _use(self, bucket: Bucket) -> None:
        """The parameters become W^, and what is written to them from here on is somebody else's."""
        self._show(bucket)
        bucket.dense, bucket.seen = False, bucket.marks()

    # At the end, and when asked

    @abstractmethod
    def _dense(self) -> list[Tensor]:
        """The weights as they would be without a mask, one tensor a layer."""

    @abstractmethod
    def _live(self) -> list[Tensor]:
        """Which weights are used, one mask a layer."""

    @abstractmethod
    def _settle(self) -> list[Tensor]:
        """The final masks, one a layer, on the budget exactly; what the method keeps is made to agree with them."""

    def _values(self, bucket: Bucket) -> list[Tensor]:
        """The weights that are used where they are live, one a layer."""
        return bucket.weights()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the steps and what the buckets keep."""
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`_state` gave."""

    def _thresholds(self) -> list[float] | None:
        """The threshold on the magnitudes of each layer, if there is one."""
        return None

    def _alpha(self) -> float | None:
        """The factor on the gradient of masked weights, if there is one."""
        return None

    # What the sparsifier does for all of them

    @abstractmethod
    def _notice(self, bucket: Bucket) -> None:
        """Take in weights that somebody else has written."""

    @abstractmethod
    def _set_aside(self, buckets: Sequence[Bucket]) -> None:
        """Leave layers of these buckets out that have no gradient in the first step."""

    @abstractmethod
    def _advance(self) -> bool:
        """A step is over: the method moves, and whether it has."""


class Part:
    """The share of one optimizer in a method's work: listens to its steps.

    Attributes:
        method, optimizer: whose work it is, and around whose steps.
        buckets: the layers that the optimizer trains.
        attachment: what calls it.
        stepped: whether the optimizer has, since the method's last step.
        judged: whether it is known which of the layers take part.
    """

    def __init__(self, method: Method, optimizer: Optimizer) -> None:
        self.method, self.optimizer = method, optimizer
        self.stepped, self.judged = False, method.steps > 0
        self.find_buckets()
        self.attachment = Attachment(optimizer, self)

    def find_buckets(self) -> None:
        """Look up which layers are the optimizer's; again when the method's layers lie in others."""
        self.buckets = [bucket for bucket in self.method._buckets if bucket.optimizer is self.optimizer]

    def parameters(self) -> list[nn.Parameter]:
        """Those whose gradients it changes."""
        return [layer.parameter for bucket in self.buckets for layer in bucket.layers]

    def lift(self) -> None:
        """Something is about to move the parameters that is no step."""
        self._check_outside()
        for bucket in self.buckets:
            if not bucket.dense:
                self.method._lift(bucket)
                bucket.dense = True

    def enter(self) -> None:
        """The gradients are whole, and the optimizer is about to move the parameters."""
        self._check_outside()
        if not self.judged and any(layer.grad is not None for bucket in self.buckets for layer in bucket.layers):
            self.judged = True
            self.method._set_aside(self.buckets)
        for bucket in self.buckets:
            for parameter in bucket.own.values():
                parameter.grad = None
            # A method adds slopes of penalties and descends: what is maximized is turned round for it.
            turned = [grad for grad in bucket.grads() if grad is not None] if bucket.maximized else []
            if turned:
                torch._foreach_neg_(turned)
            self.method._before(bucket)
            if turned:
                torch._foreach_neg_(turned)
            bucket.dense = True

    def look(self) -> None:
        """The optimizer has put the parameters where it wants the loss (a closure)."""
        for bucket in self.buckets:
            if bucket.dense:
                self.method._use(bucket)

    def leave(self) -> None:
        """The optimizer has moved the parameters."""
        method = self.method
        if not self.buckets:
            return
        if method.steps < method.total_steps:
            for bucket in self.buckets:
                method._learn(bucket)
        moved = self._is_over() and method._advance()
        for bucket in method._buckets:
            if moved or bucket.dense:
                method._use(bucket)
        if all(part.judged for part in method._parts if part.buckets):
            method._initial = None

    def _check_outside(self) -> None:
        """Notice weights that somebody else has written; what leaves no mark (``.data``), in the steps that measure."""
        measures = (self.method.steps + 1) % self.method.interval == 0
        for bucket in self.buckets:
            if not bucket.dense:
                bucket.check()
                if measures or bucket.marks() != bucket.seen:
                    self.method._notice(bucket)

    def _is_over(self) -> bool:
        """Whether the method's step is: every optimizer has taken one, or this one has taken its second."""
        others = [part for part in self.method._parts if part.buckets and part is not self]
        complete = all(part.stepped for part in others)
        over = complete or self.stepped
        for part in others if over else []:
            part.stepped = False
        self.stepped = not complete
        return over
