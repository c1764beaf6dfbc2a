"""The contract of every method, written once: the model stays plain, and everything happens around optimizer steps.

::

    before a step   the gradient, dL/dW^, becomes dL/dW in place;  the parameters become W, the dense weights
    the step        is the optimizer's own
    after it        W is taken from the parameters, the method moves, and the parameters become W^, the weights used

So between two steps the parameters are the weights used, zeros included, and evaluating, saving, averaging, compiling
and sharding the model need nothing from here.
"""

from __future__ import annotations

import functools
import gc
import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from rarefy._names import unknown
from rarefy.sparse import _checks, attachment, state
from rarefy.sparse.attachment import Attachment
from rarefy.sparse.buckets import Bucket, make_buckets
from rarefy.sparse.budget import ACTIONS, Budget, check_feasible
from rarefy.sparse.companion import Companion
from rarefy.sparse.layers import Layer, local, resolve, select_layers, unwrapped
from rarefy.sparse.masks import count_all, write_sparse
from rarefy.sparse.shards import Shard, reshard, total

if TYPE_CHECKING:
    from rarefy.sparse.acceleration import Acceleration

#: finalize() warns where it changes the density by more than this share of it.
CUT = 0.05

#: What users of other libraries write, and what it is called here.
_OTHER_WORDS = {"sparsity": "target", "density": "target", "final_sparsity": "target", "steps": "total_steps"}

#: Which sparsifier is attached to a parameter.
_TAKEN: MutableMapping[nn.Parameter, weakref.ref[Sparsifier]] = WeakIdKeyDictionary()

S = TypeVar("S", bound="Sparsifier")


@dataclass(frozen=True)
class LayerState:
    """One sparsified layer, now.

    Attributes:
        name: of its parameter, without a trailing ".weight".
        shape: of the weight, (out, in, ...).
        live: how many weights are used in the forward pass.
        weight_grad_density: share of the weights whose gradient is needed, in [0, 1].
        threshold: on the magnitude (the mean over the channels where there are several); None if the method has none.
        alpha: factor on the gradient of masked weights; None if the method has none.
    """

    name: str
    shape: tuple[int, ...]
    live: int
    weight_grad_density: float
    threshold: float | None = None
    alpha: float | None = None

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of live weights, in [0, 1]."""
        return self.live / self.weights


@dataclass(frozen=True, kw_only=True)
class Info:
    """What :func:`rarefy.sparse.list_methods` tells about a method.

    Attributes:
        title: the method's own name.
        paper: where it is from.
        start: "dense" (dense to sparse) or "sparse" (sparse to sparse, from the first step).
        targeted: "always" (a target must be given), "optional", or "never".
        training_flops: what a training step costs, as ``LayerState`` reports it: forward and input gradient at the
            density of the weights used, and the weight gradient as said here.
    """

    title: str
    paper: str
    start: Literal["dense", "sparse"]
    targeted: Literal["always", "optional", "never"]
    training_flops: str


@dataclass(eq=False, repr=False)
class Sparsifier(ABC):
    """Makes a model sparse while it trains.

    ::

        sparsifier = AutoSparse(model, target=0.9, total_steps=epochs * len(loader))
        sparsifier.attach(optimizer)
        ...                                     # the training loop, as it is
        model = sparsifier.finalize()

    Making one changes nothing. From :meth:`attach` on the parameters hold the weights used; a DDP, DataParallel or
    ``torch.compile`` wrapper around the model may come before or after, and ``fully_shard`` before :meth:`attach`. A
    copy of it, as with a model that holds it, works on the copied model and is attached to nothing.

    Args:
        model: what is trained; its parameters are changed in place, by the optimizer's steps.
        total_steps: how many optimizer steps the training takes.
        include: shell patterns of the names of layers to sparsify. By default all weights that train of linear,
            convolution (transposed too), attention and recurrent layers and their subclasses; a pattern that matches
            none of those may name any parameter of two or more dimensions, such as an embedding, and patterns name
            frozen parameters and layers without a gradient too.
        exclude: shell patterns of the names of layers to leave dense.

    Raises:
        ValueError: an option out of its range, a pattern that matches nothing, nothing to sparsify.
    """

    model: nn.Module
    _: KW_ONLY
    total_steps: int
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None

    #: What the registry tells about the method.
    info: ClassVar[Info]

    #: The fewest steps that the method's schedule fits into.
    least_steps: ClassVar[int] = 1

    #: Whether the method looks at neighbouring inputs of an output, which are laid next to one another then.
    inputs_last: ClassVar[bool] = False

    #: Whether weights go on crossing thresholds in steps after the last, which only finalize() sets right.
    drifts: ClassVar[bool] = False

    #: None in a run without a target.
    budget: Budget | None = field(init=False, default=None)

    #: Multiple of the weights' learning rate that what the method learns is stepped at.
    own_rate: float = field(init=False, default=1.0)

    def __new__(cls: type[S], *arguments: Any, **options: Any) -> S:
        """Refuse options that are not there, naming what was meant."""
        known = [option.name for option in fields(cls) if option.init and option.kw_only]
        for option in options:
            if option not in known and option != "model":
                meant = _OTHER_WORDS.get(option)
                hint = f" (did you mean {meant!r}?)" if meant in known else ""
                raise ValueError(unknown(f"option of {cls.__name__}:", option, sorted(known)) + hint)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in fields(self):
            value: Any = getattr(self, option.name, None)
            if getattr(value, "ndim", None) == 0:  # a number of NumPy's or a tensor's, which no checkpoint should hold
                setattr(self, option.name, value.item())
        self.total_steps = _checks.whole("total_steps", self.total_steps, what="number of optimizer steps")
        if self.total_steps < self.least_steps:
            raise ValueError(
                f"total_steps={self.total_steps} is too few for the schedule of {type(self).__name__}, which needs at "
                f"least {self.least_steps}"
            )
        self.model = unwrapped(self.model)
        self.steps = 0
        self.interval = max(1, self.total_steps // ACTIONS)
        self.include = _checks.patterns("include", self.include)
        self.exclude = _checks.patterns("exclude", self.exclude)
        self._chosen = select_layers(self.model, self.include, self.exclude, self._floors())
        self._layers = list(self._chosen)
        self._check_shapes()
        self.budget = self._whole_budget = self._make_budget()
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[Bucket, int]] = {}
        self._parts: list[_Part] = []
        self._shown = self._finalized = False
        self._initial: list[Tensor] | None = None
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._copied: dict[str, Any] | None = None
        self._acceleration: Acceleration | None = None
        self._told: set[str] = set()
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _LIVING.add(self)
        _watch_all_optimizers()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which goes with the copied model and is attached to nothing."""
        copied = self.state_dict() if self._shown and not self._finalized else None
        return {
            **vars(self),
            "_parts": [],
            "_buckets": [],
            "_places": {},
            "_known": None,
            "_copied": copied,
            "_acceleration": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        vars(self).update(state)
        self._known = weakref.WeakSet()
        _LIVING.add(self)
        _watch_all_optimizers()

    # What a method provides

    @abstractmethod
    def _begin(self) -> None:
        """Make what the method keeps, in every bucket, from the dense weights that the parameters hold."""

    @abstractmethod
    def _lift(self, bucket: Bucket) -> None:
        """The parameters become W, and nothing else."""

    @abstractmethod
    def _before(self, bucket: Bucket) -> None:
        """The gradients become those of the dense weights, and of what the method learns; the parameters become W."""

    @abstractmethod
    def _take(self, bucket: Bucket) -> None:
        """Take W from the parameters, where ``bucket.dense``."""

    @abstractmethod
    def _show(self, bucket: Bucket) -> None:
        """The parameters become W^; takes W from them before, where ``bucket.dense``."""

    @abstractmethod
    def _update(self) -> None:
        """What the method does after an optimizer step; up to and with the last of ``total_steps``."""

    @abstractmethod
    def live_masks(self) -> dict[str, Tensor]:
        """Return which weights are used, by the layer's name: boolean, this process's part of the layer."""

    @abstractmethod
    def _settle(self) -> list[Tensor]:
        """The final masks, one a layer, on the budget exactly; what the method keeps is made to agree with them."""

    def prepare(self, bucket: Bucket) -> None:  # noqa: B027
        """Make what the method learns and keeps in a bucket besides, from the dense weights."""

    def dense_weights(self) -> dict[str, Tensor]:
        """Return the weights as they would be without a mask, by the layer's name: this process's part of the layer."""
        self._ready()
        return {layer.name: layer.local for layer in self._layers}

    def _values(self, bucket: Bucket) -> list[Tensor]:
        """The weights that are used where they are live, one a layer."""
        return bucket.weights()

    def _changed(self, bucket: Bucket) -> bool:
        """Take in weights that somebody else has written since the last step; whether they differ from ours."""
        return False

    def _state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the steps and what the buckets keep."""
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`_state` gave."""

    def _check_shapes(self) -> None:  # noqa: B027
        """Raise ValueError for layers whose shapes, or parts on the processes, the method cannot work on."""

    def _floors(self) -> float | Mapping[str, float]:
        return 0.0

    def _make_budget(self) -> Budget | None:
        return None

    def weight_grad_density(self, density: float) -> float:
        """Share of a layer's weights whose gradient is needed, when this share of them is live."""
        return density

    def reads_masked_gradients(self) -> bool:
        """Whether the next step needs the gradient of any weight that is masked."""
        few = 1e-6
        return self.weight_grad_density(few) > few

    def _thresholds(self) -> list[float] | None:
        """The threshold on the magnitudes of each layer, if there is one."""
        return None

    def _alpha(self) -> float | None:
        """The factor on the gradient of masked weights, if there is one."""
        return None

    # What every method has

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.steps / self.total_steps, 1.0)

    @property
    def finalized(self) -> bool:
        """Whether :meth:`finalize` has been called."""
        return self._finalized

    def aim(self) -> float | None:
        """Return the density that the method steers towards now, in (0, 1]; None where it follows no curve."""
        return None

    def attach(self: S, *optimizers: Any) -> S:
        """Work around the steps of these optimizers, until :meth:`finalize`; replaces those attached before.

        From here on the model's parameters are the weights used. Give all optimizers that train the model; wrappers of
        accelerate and Lightning are looked through.

        Raises:
            TypeError: what is given is no optimizer.
            ValueError: none of them, or more than one, holds the weight of a sparsified layer; another sparsifier is
                attached to a layer; an optimizer that keeps the weights elsewhere (DeepSpeed), or that gives no
                learning rate for what the method learns (LBFGS).
            RuntimeError: after :meth:`finalize`.
        """
        if self._finalized:
            raise RuntimeError(
                "attach() after finalize(): the model is a plain one now; make a new sparsifier to go on"
            )
        inner = list(dict.fromkeys(attachment.unwrapped(optimizer) for optimizer in optimizers))
        if not inner:
            raise TypeError("attach() takes the optimizers that train the model, got none: attach(optimizer)")
        resolve(self.model, self._chosen)
        owners = [self._owner(layer, inner) for layer in self._layers]
        self._check_shapes()
        self._check_free()
        self._check_memory()
        saved = self.state_dict() if self._shown else None
        self._detach()
        self._rebuild(owners)
        if saved is not None:
            self._restore(saved)
            self._waiting = {}
        elif self.steps == 0:
            self._initial = [layer.local.clone() for layer in self._layers]
        self._parts = [_Part(self, [b for b in self._buckets if b.optimizer is optimizer]) for optimizer in inner]
        for part, optimizer in zip(self._parts, inner, strict=True):
            part.attachment = Attachment(optimizer, part)
            self._known.update(part.attachment.all)
        for layer in self._layers:
            _TAKEN[layer.parameter] = weakref.ref(self)
        self._show_all()
        return self

    def sparsity(self) -> float:
        """Share of zeros among the weights of the sparsified layers, in [0, 1]."""
        layers = self.layers()
        return 1.0 - sum(layer.live for layer in layers) / sum(layer.weights for layer in layers)

    @torch.no_grad()
    def layers(self) -> list[LayerState]:
        """Return the state of every sparsified layer, in the model's order; after :meth:`finalize`, what is left."""
        if self._finalized:
            used = count_all([layer.local != 0 for layer in self._layers], self._shards())
            return [
                LayerState(layer.name, layer.shape, live, live / layer.size)
                for layer, live in zip(self._layers, used, strict=True)
            ]
        self._ready()
        live = count_all(list(self.live_masks().values()), self._shards())
        thresholds: Sequence[float | None] = self._thresholds() or [None] * len(live)
        return [
            LayerState(layer.name, layer.shape, n, self.weight_grad_density(n / layer.size), threshold, self._alpha())
            for layer, n, threshold in zip(self._layers, live, thresholds, strict=True)
        ]

    @torch.no_grad()
    def finalize(self, model: nn.Module | None = None) -> nn.Module:
        """Leave exact zeros in the trained model and return it; the sparsifier lets go of it and of the optimizers.

        With a target the number of zeros is exact: the best weights whose cost fits the budget stay. Give ``model`` to
        cut a copy of the trained model to the same mask instead (an exponential moving average, a deepcopy).

        Raises:
            ValueError: weights that are not finite; a model given without one of the layers; called twice.
        """
        own = model is None or unwrapped(model) is self.model
        reshard(self.model if model is None else model)
        if own and self._finalized:
            raise ValueError("the model is a plain one: already finalized; to go on, make a new sparsifier")
        copies = [] if own else self._copies(model)
        if self._finalized:
            for layer, parameter in zip(self._layers, copies, strict=True):
                write_sparse(local(parameter.detach()), local(parameter.detach()), layer.local != 0)
            return self.model if model is None else model
        self._ready(by_value=True)
        targets = [layer.parameter for layer in self._layers] if own else copies
        if own:
            self._check_finite(finalizing=True)
            self._warn_of_cut()
        before = state.export(self._buckets) if not own else None
        masks = self._settle()
        values = self._by_layer(self._values) if own else [local(parameter.detach()) for parameter in targets]
        for parameter, value, mask in zip(targets, values, masks, strict=True):
            write_sparse(local(parameter.detach()), value, mask)
        if before is not None:
            state.restore(self._buckets, before)
            return self.model if model is None else model
        self._detach()
        self._buckets, self._finalized = [], True
        self._places.clear()
        return self.model if model is None else model

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the states of model and optimizer; tensors of shards are DTensors."""
        if self._finalized:
            raise RuntimeError("state_dict() after finalize(): the model is a plain one now, and its own state is all")
        with torch.no_grad():
            self._ready(by_value=True)
        aside = [layer.name for layer in self._chosen if layer not in self._layers]
        return {
            "config": self._config(),
            "steps": self.steps,
            "aside": aside,
            "method": self._state(),
            "layers": {
                name: {**self._waiting.get(name, {}), **tensors}
                for name, tensors in state.export(self._buckets).items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; before or after :meth:`attach`, and before or after the model's.

        Raises:
            ValueError: it is no sparsifier's state, or of one with other options.
        """
        state.check(state_dict, self._config())
        if not self._buckets:
            self._ready()
        # Before the first step: if the model was loaded first, attach() has masked weights of the checkpoint.
        for layer, weight in zip(self._layers, self._initial or [], strict=False):
            bucket, place = self.where(layer)
            if bucket.marks()[place] == bucket.seen[place]:
                layer.local.copy_(weight)
        self._restore(state_dict)
        self._show_all()

    def _config(self) -> dict[str, Any]:
        """What a checkpoint's sparsifier must have in common with the one that goes on: all options, and the layers."""
        elsewhere = {"model", "include", "exclude", "example_input"}
        options = {
            option.name: dict(value) if isinstance(value, Mapping) else [*value] if isinstance(value, tuple) else value
            for option in fields(self)
            if option.init and option.name not in elsewhere
            for value in [getattr(self, option.name)]
            if value is None or isinstance(value, (bool, int, float, str, tuple, Mapping))
        }
        return {
            "method": type(self).__name__,
            **options,
            "layers": {layer.name: list(layer.shape) for layer in self._chosen},
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        aside = set(saved["aside"])
        now = [layer for layer in self._chosen if layer.name not in aside]
        if now != self._layers:
            self._leave_out([layer for layer in self._chosen if layer.name in aside])
        self.steps = int(saved["steps"])
        self._initial = None if self.steps else self._initial
        for part in self._parts:
            part.judged = part.judged or self.steps > 0
        state.restore(self._buckets, saved["layers"])
        try:
            self._load_state(saved["method"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint's state of {type(self).__name__} is not whole: {error!r}") from None
        if not self._parts:  # what the learning of thresholds remembers waits for an optimizer to learn by
            self._waiting = _steps_of(saved["layers"])
        for bucket in self._buckets:
            bucket.dense = False

    # Buckets and layers

    def _owner(self, layer: Layer, optimizers: Sequence[Optimizer]) -> tuple[Optimizer | None, int | None]:
        owners = [
            (optimizer, index)
            for optimizer in optimizers
            for index, group in enumerate(optimizer.param_groups)
            if any(parameter is layer.parameter for parameter in group["params"])
        ]
        if len(owners) > 1:
            kinds = " and ".join(type(optimizer).__name__ for optimizer, _ in owners)
            raise ValueError(
                f"the weight of layer {layer.name!r} is in several of the optimizers, {kinds}: attach the one that "
                "trains it now, the outer one if one wraps the other, and call attach() again when that changes"
            )
        if owners:
            return owners[0]
        if layer.parameter.requires_grad:
            raise ValueError(
                f"the optimizer does not hold the weight of layer {layer.name!r}: give attach() every optimizer that "
                f"trains the model, made after it was sharded or cast, or pass exclude=[{layer.name!r}]"
            )
        return None, None

    def _check_free(self) -> None:
        for layer in self._layers:
            other = _attached_to(layer.parameter)
            if other is not None and other is not self:
                del other
                gc.collect()  # what goes with an optimizer that is gone
                other = _attached_to(layer.parameter)
            if other is not None and other is not self:
                raise ValueError(
                    f"layer {layer.name!r} is being sparsified already, by {type(other).__name__}: finalize() that "
                    f"one, make the model and its optimizer anew, or pass exclude=[{layer.name!r}]"
                )

    def _check_memory(self) -> None:
        for layer in self._layers:
            if layer.parameter.is_meta:
                raise ValueError(f"the weight of layer {layer.name!r} is on the meta device; give it memory first")

    @torch.no_grad()
    def _rebuild(self, owners: Sequence[tuple[Optimizer | None, int | None]]) -> None:
        self._buckets = make_buckets(self._layers, owners, inputs_last=self.inputs_last)
        self._places = {id(layer): (b, i) for b in self._buckets for i, layer in enumerate(b.layers)}
        self._begin()
        for bucket in self._buckets:
            if bucket.own and bucket.optimizer is not None and bucket.group is not None:
                bucket.companion = Companion(bucket.trainers, bucket.group, bucket.own, self.own_rate)
            bucket.seen = bucket.marks()

    def _ready(self, by_value: bool = False) -> None:
        """What the method keeps is there, and agrees with the weights; ``by_value`` sees what leaves no mark too."""
        moved = [bucket for bucket in self._buckets if not bucket.dense and bucket.marks() != bucket.seen]
        if not self._buckets or (moved and not self._shown):
            resolve(self.model, self._chosen)
            self._check_shapes()
            self._check_memory()
            self._rebuild([(None, None)] * len(self._layers))
            if self._copied is not None:
                copied, self._copied = self._copied, None
                self._restore(copied)
        elif self._shown:
            if by_value and resolve(self.model, self._layers):
                moved = self._buckets
            for bucket in self._buckets if by_value else moved:
                if not bucket.dense:
                    self._notice(bucket)

    def _show_all(self) -> None:
        reshard(self.model)
        with torch.no_grad():
            for bucket in self._buckets:
                self._show(bucket)
                bucket.dense, bucket.seen = False, bucket.marks()
        self._shown = True

    def where(self, layer: Layer) -> tuple[Bucket, int]:
        """Find the bucket that a layer is in, and its place there."""
        return self._places[id(layer)]

    def _shards(self) -> list[Shard | None]:
        return [layer.shard for layer in self._layers]

    def _by_layer(self, of: Callable[[Bucket], Sequence[Any]]) -> list[Any]:
        """What a function of a bucket gives for each of its layers, in the order of ``_layers``."""
        lists = {id(bucket): of(bucket) for bucket in self._buckets}
        return [lists[id(bucket)][place] for bucket, place in (self.where(layer) for layer in self._layers)]

    def kept(self, name: str) -> list[Tensor]:
        """View a flat tensor that the buckets keep as one tensor a layer, on the same memory."""
        return self._by_layer(lambda bucket: bucket.views(bucket.kept[name]))

    # Around the optimizers' steps

    def _lift_all(self, part: _Part) -> None:
        for bucket in part.buckets:
            if not bucket.dense:
                self._check_outside(bucket)
                self._lift(bucket)
                bucket.dense = True

    def _check_outside(self, bucket: Bucket) -> None:
        """Notice weights that somebody else has written; what leaves no mark (``.data``), in the steps that measure."""
        bucket.check()
        if bucket.marks() != bucket.seen or (self.steps + 1) % self.interval == 0:
            self._notice(bucket)

    def _enter(self, part: _Part) -> None:
        for bucket in part.buckets:
            if not bucket.dense:
                self._check_outside(bucket)
        if not part.judged and any(layer.grad is not None for bucket in part.buckets for layer in bucket.layers):
            part.judged = True
            self._set_aside(part)
        for bucket in part.buckets:
            for parameter in bucket.own.values():
                parameter.grad = None
            # A method adds slopes of penalties and descends: what is maximized is turned round for it.
            turned = [grad for grad in bucket.grads() if grad is not None] if bucket.maximized else []
            if turned:
                torch._foreach_neg_(turned)
            self._before(bucket)
            if turned:
                torch._foreach_neg_(turned)
            bucket.dense = True

    def _look(self, part: _Part) -> None:
        for bucket in part.buckets:
            if bucket.dense:
                self._show(bucket)
                bucket.dense, bucket.seen = False, bucket.marks()

    def _leave(self, part: _Part) -> None:
        if not part.buckets:
            return
        if self.steps < self.total_steps:
            for bucket in part.buckets:
                self._learn(bucket)
        # A step is over when every optimizer has taken one, or one of them takes its second.
        others = [other for other in self._parts if other.buckets and other is not part]
        complete = all(other.stepped for other in others)
        over = complete or part.stepped
        for other in others if over else []:
            other.stepped = False
        part.stepped = not complete
        changed = [bucket for bucket in self._buckets if bucket.dense]
        if over:
            self.steps += 1
            if self.drifts and self.steps == self.total_steps + 1:
                self._tell(
                    "over",
                    f"training goes on after total_steps={self.total_steps}: from here on weights cross thresholds "
                    "that nothing moves, and only finalize() lands on the target again; finalize() first, or give "
                    "the steps of the whole run",
                )
            if self.steps <= self.total_steps and self._healthy():
                self._update()
                changed = self._buckets
        for bucket in changed:
            self._show(bucket)
            bucket.dense, bucket.seen = False, bucket.marks()
        if all(other.judged for other in self._parts if other.buckets):
            self._initial = None

    def _learn(self, bucket: Bucket) -> None:
        """A step of what the method learns, where there is a gradient for it."""
        if bucket.companion is not None and any(parameter.grad is not None for parameter in bucket.own.values()):
            bucket.companion.step()

    def _healthy(self) -> bool:
        """Whether the weights are finite, looked at in the steps that measure."""
        if self.steps % self.interval == 0 or self.steps == self.total_steps:
            replaced = resolve(self.model, self._layers)
            if replaced:
                raise RuntimeError(
                    f"the model has another parameter as {replaced[0].key!r} than when the sparsifier was attached; "
                    "call attach() with the optimizer that trains it"
                )
            return self._check_finite()
        return "finite" not in self._told

    def _check_finite(self, finalizing: bool = False) -> bool:
        # w - w is 0 for what is finite, and the same is decided wherever a part of the layer lies.
        counts = count_all([(w - w).sum() != 0 for w in self._parameters()], self._shards())
        bad = [layer.name for layer, count in zip(self._layers, counts, strict=True) if count]
        if not bad:
            self._told.discard("finite")
            return True
        message = (
            f"the weights of {len(bad)} of {len(self._layers)} sparsified layers, {bad[0]!r} first, are not finite "
            f"(NaN or inf) after {self.steps} steps"
        )
        if finalizing:
            raise ValueError(f"{message}: there is nothing to finalize; go back to a checkpoint from before")
        self._tell("finite", f"{message}: masks stay as they are; lower the learning rate, clip, or skip such batches")
        return False

    def _parameters(self) -> list[Tensor]:
        return [layer.local for layer in self._layers]

    def _set_aside(self, part: _Part) -> None:
        """Leave layers out that no forward uses: in the first step they have no gradient."""
        mine = [layer for bucket in part.buckets for layer in bucket.layers if layer.parameter.requires_grad]
        graded = torch.tensor([int(layer.grad is not None) for layer in mine], device=mine[0].local.device)
        used = total(graded, [layer.shard for layer in mine]).tolist()
        unused = [layer for layer, anywhere in zip(mine, used, strict=True) if not anywhere]
        if self.include is not None or not unused or len(unused) == len(self._layers) or self._initial is None:
            return
        names = ", ".join(repr(layer.name) for layer in unused[:3]) + (", ..." if len(unused) > 3 else "")
        warnings.warn(
            f"{len(unused)} of {len(self._layers)} layers ({names}) have no gradient in the first step, as if nothing "
            "used them: they stay dense and take no share of the target; name them in include to keep them",
            stacklevel=2,
        )
        # Another optimizer's layers may have trained already: of those only what was masked is as it was at first.
        dense = self.dense_weights()
        for layer, first in zip(self._layers, self._initial, strict=True):
            now = dense[layer.name]
            layer.local.copy_(torch.where(now == 0.0, first, now))
        self._initial = [w for layer, w in zip(self._layers, self._initial, strict=True) if layer not in unused]
        self._leave_out(unused)
        self._show_all()

    def _leave_out(self, out: Sequence[Layer]) -> None:
        owners = {id(layer): (bucket.optimizer, bucket.group) for bucket in self._buckets for layer in bucket.layers}
        self._layers, self.budget = list(self._chosen), self._whole_budget
        for layer in out:
            index = self._layers.index(layer)
            if self.budget is not None:
                self.budget = self.budget.without(index, layer.size)
            del self._layers[index]
        if self.budget is not None:
            check_feasible(self.budget, [layer.least for layer in self._layers])
        self._relayer()
        self._rebuild([owners.get(id(layer), (None, None)) for layer in self._layers])
        for part in self._parts:
            optimizer = part.attachment.optimizer if part.attachment is not None else None
            part.buckets = [bucket for bucket in self._buckets if bucket.optimizer is optimizer]

    def _relayer(self) -> None:  # noqa: B027
        """What a method derives from its layers, made again when they have become fewer."""

    def _notice(self, bucket: Bucket) -> None:
        """Weights that were written by somebody else, found before a step or when asked."""
        if self._changed(bucket):
            self._tell(
                "changed",
                "weights were changed outside the optimizer's step() and are taken as they are now: after "
                "load_state_dict() that is right; if an optimizer or a wrapper moves them, attach() that one",
            )
        bucket.seen = bucket.marks()

    def _unattached(self, optimizer: Optimizer) -> None:
        """An optimizer that was not given to :meth:`attach` has stepped."""
        if self._finalized or optimizer in self._known:
            return
        self._known.add(optimizer)
        mine = {id(layer.parameter): layer.name for layer in self._layers}
        held = [mine[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in mine]
        if held:
            self._tell(
                "unattached",
                f"{type(optimizer).__name__} has moved the weights of {len(held)} sparsified layers, {held[0]!r} "
                f"first, and the sparsifier of {type(self).__name__} is not attached to it: call attach(optimizer) "
                "before training",
            )

    def _tell(self, about: str, message: str) -> None:
        """Warn, once about each thing."""
        if about not in self._told:
            self._told.add(about)
            warnings.warn(message, stacklevel=2)

    def _warn_of_cut(self) -> None:
        if self.budget is None:
            return
        live = count_all(list(self.live_masks().values()), self._shards())
        density = self.budget.density(live)
        off = abs(density - self.budget.goal)
        if off > CUT * self.budget.goal and abs(self.budget.left(live)) > self.budget.dearest:
            advice = "train to the last step" if self.steps < self.total_steps else "train no further than that"
            warnings.warn(
                f"finalize() after {self.steps} of {self.total_steps} steps goes from a density of {density:.4f} "
                f"to {self.budget.goal:.4f} at once, which costs accuracy; {advice} (an optimizer step after "
                "finalize() fills zeros again)",
                stacklevel=4,
            )

    def _copies(self, model: nn.Module | None) -> list[nn.Parameter]:
        parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False)) if model is not None else {}
        missing = [layer.key for layer in self._layers if layer.key not in parameters]
        if missing:
            inside = "; give what it wraps, its .module" if f"module.{missing[0]}" in parameters else ""
            raise ValueError(
                f"the model given to finalize() has no parameter {missing[0]!r}{inside}; give a copy of the trained one"
            )
        for layer in self._layers:
            if tuple(parameters[layer.key].shape) != layer.shape:
                raise ValueError(
                    f"{layer.key!r} of the model given to finalize() has the shape "
                    f"{tuple(parameters[layer.key].shape)}, that of the trained one {layer.shape}; "
                    "give a copy of that"
                )
            if getattr(parameters[layer.key], "placements", None) != getattr(layer.parameter, "placements", None):
                raise ValueError(
                    f"{layer.key!r} of the model given to finalize() is not sharded as that of the trained one: "
                    "give a copy that fully_shard has split alike, or finalize a whole copy with the sparsifier of a "
                    "whole model, whose load_state_dict() takes this one's state"
                )
        return [parameters[layer.key] for layer in self._layers]

    def _detach(self) -> None:
        for part in self._parts:
            if part.attachment is not None:
                part.attachment.remove()
                self._known.difference_update(part.attachment.all)
        self._parts = []
        for layer in self._chosen:
            if _attached_to(layer.parameter) is self:
                del _TAKEN[layer.parameter]


def _attached_to(parameter: nn.Parameter) -> Sparsifier | None:
    return _TAKEN[parameter]() if parameter in _TAKEN else None


def _steps_of(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Of what the buckets keep, what the steps of the method's own parameters remember."""
    return {
        name: {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
        for name, tensors in layers.items()
    }


class _Part:
    """The share of one optimizer in a sparsifier's work."""

    def __init__(self, sparsifier: Sparsifier, buckets: list[Bucket]) -> None:
        self.sparsifier, self.buckets = sparsifier, buckets
        self.attachment: Attachment | None = None
        self.stepped = False  # since the sparsifier's last step
        self.judged = sparsifier.steps > 0  # which layers take part is known

    def parameters(self) -> list[nn.Parameter]:
        return [layer.parameter for bucket in self.buckets for layer in bucket.layers]

    def lift(self) -> None:
        self.sparsifier._lift_all(self)

    def enter(self) -> None:
        self.sparsifier._enter(self)

    def look(self) -> None:
        self.sparsifier._look(self)

    def leave(self) -> None:
        self.sparsifier._leave(self)


#: Every sparsifier that is alive, to tell of steps of optimizers that it is not attached to.
_LIVING: weakref.WeakSet[Sparsifier] = weakref.WeakSet()


@functools.cache
def _watch_all_optimizers() -> None:
    """Let living sparsifiers see the steps of all optimizers; one hook for all, which is never taken away.

    A hook of each, removed when it is collected, could be removed while an optimizer walks through its hooks.
    """

    def seen(optimizer: Optimizer, *_: Any) -> None:
        for sparsifier in list(_LIVING):
            sparsifier._unattached(optimizer)

    register_optimizer_step_post_hook(seen)
