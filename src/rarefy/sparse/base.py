"""A method at work on a model: from the choice of layers through attaching, steps and checkpoints to the end.

What a method is asked, and when, is :mod:`rarefy.sparse.contract`.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import _checks
from rarefy.sparse import _options, attachment, notices, owners, state
from rarefy.sparse.buckets import Bucket, make_buckets
from rarefy.sparse.budget import ACTIONS, Budget, check_feasible
from rarefy.sparse.contract import Method, Part
from rarefy.sparse.layers import (
    Layer,
    check_memory,
    check_same,
    copies_of,
    local,
    not_finite,
    resolve,
    select_layers,
    unwrapped,
    without_gradient,
)
from rarefy.sparse.masks import count_all, write_sparse
from rarefy.sparse.owners import Owner
from rarefy.sparse.reports import Info, LayerState
from rarefy.sparse.shards import Shard, reshard

if TYPE_CHECKING:
    from rarefy.sparse.acceleration import Acceleration

S = TypeVar("S", bound="Sparsifier")


@dataclass(eq=False, repr=False)
class Sparsifier(Method):
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
        _options.known(f"option of {cls.__name__}:", [each for each in options if each != "model"], known)
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
        self.include = _options.patterns("include", self.include)
        self.exclude = _options.patterns("exclude", self.exclude)
        self._chosen = select_layers(self.model, self.include, self.exclude, self._floors())
        self._layers = list(self._chosen)
        self._check_shapes()
        self.budget = self._whole_budget = self._make_budget()
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[Bucket, int]] = {}
        self._parts: list[Part] = []
        self._shown = self._finalized = False
        self._sound = True  # whether the weights were finite when they were last looked at
        self._initial: list[Tensor] | None = None
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._copied: dict[str, Any] | None = None
        self._acceleration: Acceleration | None = None
        self._told: set[str] = set()
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        owners.watch(self, Sparsifier._unattached)

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
        owners.watch(self, Sparsifier._unattached)

    # What a method provides, besides what the contract asks of its family

    def prepare(self, bucket: Bucket) -> None:
        """Make what the method learns and keeps in a bucket besides, from the dense weights."""

    def dense_weights(self) -> dict[str, Tensor]:
        """Copy the weights as they would be without a mask, by the layer's name: this process's part of the layer."""
        with self._as_written():
            return dict(zip([layer.name for layer in self._layers], [w.clone() for w in self._dense()], strict=True))

    def weight_grad_density(self, density: float) -> float:
        """Share of a layer's weights whose gradient is needed, when this share of them is live."""
        return density

    def reads_masked_gradients(self) -> bool:
        """Whether the next step needs the gradient of any weight that is masked."""
        few = 1e-6
        return self.weight_grad_density(few) > few

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
                attached to a layer; a weight that is NaN or infinite; an optimizer that keeps the weights elsewhere
                (DeepSpeed), or that gives no learning rate for what the method learns (LBFGS).
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
        trainers = [owners.trainer_of(layer, inner) for layer in self._layers]
        self._check_shapes()
        owners.check_free(self._layers, self)
        check_memory(self._layers)
        if not self._shown and (bad := not_finite(self._layers)):
            found = notices.not_finite(bad, self._layers, self.steps)
            raise ValueError(f"{found}: load or initialise them before attach(), or pass exclude=[{bad[0].name!r}]")
        saved = self.state_dict() if self._shown else None
        self._detach()
        self._rebuild(trainers)
        if saved is not None:
            self._restore(saved)
            self._waiting = {}
        elif self.steps == 0:
            self._initial = [layer.local.clone() for layer in self._layers]
        for optimizer in inner:
            self._parts.append(Part(self, optimizer))
            self._known.update(self._parts[-1].attachment.all)
        owners.take(self._layers, self)
        self._show_all()
        return self

    def live_masks(self) -> dict[str, Tensor]:
        """Copy which weights are used, by the layer's name: boolean, this process's part of the layer."""
        with self._as_written():
            return dict(zip([layer.name for layer in self._layers], [m.clone() for m in self._live()], strict=True))

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
        with self._as_written():
            live = self._count_live()
            thresholds: Sequence[float | None] = self._thresholds() or [None] * len(live)
        return [
            LayerState(layer.name, layer.shape, n, self.weight_grad_density(n / layer.size), threshold, self._alpha())
            for layer, n, threshold in zip(self._layers, live, thresholds, strict=True)
        ]

    @torch.no_grad()
    def finalize(self, model: nn.Module | None = None) -> nn.Module:
        """Leave exact zeros in the trained model and return it; the sparsifier lets go of it and of the optimizers.

        With a target the number of zeros is exact: the best weights whose cost fits the budget stay. Of a schedule-free
        optimizer the averages are taken: it is in its ``eval()`` mode from here on. Give ``model`` to cut a copy of the
        trained model to the same mask instead (an exponential moving average, a deepcopy).

        Raises:
            ValueError: weights that are not finite; a model given without one of the layers; called twice.
        """
        given, own = self.model if model is None else model, model is None or unwrapped(model) is self.model
        reshard(given)
        if own and self._finalized:
            raise ValueError("the model is a plain one: already finalized; to go on, make a new sparsifier")
        copies = [] if own else copies_of(self._layers, given)
        if self._finalized:
            for layer, parameter in zip(self._layers, copies, strict=True):
                write_sparse(local(parameter.detach()), local(parameter.detach()), layer.local != 0)
            return given
        averaging = [part.optimizer for part in self._parts if attachment.has_modes(part.optimizer)] if own else []
        for optimizer in averaging:
            optimizer.eval()  # type: ignore[attr-defined]
        if not self._build() and self._shown:
            resolve(self.model, self._layers)
            for bucket in self._moved(by_value=True):
                self._notice(bucket)
        targets = [layer.parameter for layer in self._layers] if own else copies
        if own:
            bad = not_finite(self._layers)
            if bad:
                found = notices.not_finite(bad, self._layers, self.steps)
                raise ValueError(f"{found}: there is nothing to finalize; go back to a checkpoint from before")
            if self.budget is not None and notices.is_far(self.budget, live := self._count_live()):
                warnings.warn(notices.cut(self.budget, live, self.steps, self.total_steps), stacklevel=3)
        before = state.export(self._buckets) if not own else None
        masks = self._settle()
        values = self._by_layer(self._values) if own else [local(parameter.detach()) for parameter in targets]
        for parameter, value, mask in zip(targets, values, masks, strict=True):
            write_sparse(local(parameter.detach()), value, mask)
        if before is not None:
            state.restore(self._buckets, before)
            return given
        for layer, mask in zip(self._layers, masks, strict=True):
            bucket, _ = self.where(layer)
            if bucket.optimizer in averaging:  # its modes move the weights towards what it remembers
                bucket.forget(layer, ~mask)
        self._detach()
        self._buckets, self._finalized = [], True
        self._places.clear()
        return given

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the states of model and optimizer; tensors of shards are DTensors."""
        if self._finalized:
            raise RuntimeError("state_dict() after finalize(): the model is a plain one now, and its own state is all")
        with self._as_written(by_value=True):
            kept = state.export(self._buckets)
        return {
            "config": state.options(self, self._chosen),
            "steps": self.steps,
            "aside": [layer.name for layer in self._chosen if layer not in self._layers],
            "method": self._state(),
            "layers": {name: {**self._waiting.get(name, {}), **tensors} for name, tensors in kept.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; before or after :meth:`attach`, and before or after the model's.

        Raises:
            ValueError: it is no sparsifier's state, or of one with other options.
            RuntimeError: the model was moved or cast since :meth:`attach`.
        """
        state.check(state_dict, state.options(self, self._chosen))
        self._build()
        for bucket in self._buckets:
            bucket.check()
        # Before the first step: if the model was loaded first, attach() has masked weights of the checkpoint.
        for layer, weight in zip(self._layers, self._initial or [], strict=False):
            bucket, place = self.where(layer)
            if bucket.marks()[place] == bucket.seen[place]:
                layer.local.copy_(weight)
        self._restore(state_dict)
        self._show_all()

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
            self._waiting = state.of_companions(saved["layers"])
        for bucket in self._buckets:
            bucket.dense = False
        self._sound = True
        self._told.discard("finite")

    # Buckets and layers

    @torch.inference_mode(False)  # which no tensor may be of that is written to later
    @torch.no_grad()
    def _rebuild(self, trainers: Sequence[Owner]) -> None:
        self._buckets = make_buckets(self._layers, trainers, inputs_last=self.inputs_last)
        self._places = {id(layer): (b, i) for b in self._buckets for i, layer in enumerate(b.layers)}
        self._begin()
        for bucket in self._buckets:
            bucket.accompany(self.own_rate)
            bucket.seen = bucket.marks()

    def _build(self) -> bool:
        """Make what the method keeps, where it is not there or the weights have moved before :meth:`attach`."""
        if self._buckets and (self._shown or not self._moved()):
            return False
        resolve(self.model, self._chosen)
        self._check_shapes()
        check_memory(self._layers)
        self._rebuild([(None, None)] * len(self._layers))
        if self._copied is not None:
            copied, self._copied = self._copied, None
            self._restore(copied)
        return True

    def _moved(self, by_value: bool = False) -> list[Bucket]:
        """Where somebody else may have written weights; ``by_value``: also what leaves no mark."""
        return [bucket for bucket in self._buckets if not bucket.dense and (by_value or bucket.marks() != bucket.seen)]

    @contextlib.contextmanager
    def _as_written(self, by_value: bool = False) -> Iterator[None]:
        """Have what the method keeps agree with the weights that are there, for as long as a question takes.

        Those that somebody else has written, such as an average to evaluate, may be put back: what is there in the next
        step is what training goes on from.
        """
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as after:
            if not self._build() and self._shown:
                if by_value:
                    known = [layer.parameter for layer in self._layers]
                    resolve(self.model, self._layers)
                    for layer, parameter in zip(self._layers, known, strict=True):
                        if layer.parameter is not parameter:
                            after.callback(layer.take, parameter)
                for bucket in self._moved(by_value):
                    kept = {name: value.clone() for name, value in bucket.kept.items()}
                    if self._changed(bucket):
                        after.callback(bucket.put_back, kept)
                        self._tell("changed", notices.CHANGED)
            yield

    def _show_all(self) -> None:
        reshard(self.model)
        with torch.no_grad():
            for bucket in self._buckets:
                self._use(bucket)
        self._shown = True

    def _count_live(self) -> list[int]:
        return count_all(self._live(), self._shards())

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

    def _advance(self) -> bool:
        self.steps += 1
        if self.drifts and self.steps == self.total_steps + 1:
            self._tell("over", notices.over(self.total_steps))
        if self.steps > self.total_steps or not self._healthy():
            return False
        self._update()
        return True

    def _healthy(self) -> bool:
        """Whether the weights are finite, looked at in the steps that measure."""
        if self.steps % self.interval == 0 or self.steps == self.total_steps:
            check_same(self.model, self._layers)
            bad = not_finite(self._layers)
            self._sound = not bad
            if bad:
                self._tell("finite", f"{notices.not_finite(bad, self._layers, self.steps)}: {notices.MASKS_STAY}")
            else:
                self._told.discard("finite")
        return self._sound

    def _set_aside(self, buckets: Sequence[Bucket]) -> None:
        unused = without_gradient([layer for bucket in buckets for layer in bucket.layers])
        if self.include is not None or not unused or len(unused) == len(self._layers) or self._initial is None:
            return
        warnings.warn(notices.unused(unused, self._layers), stacklevel=2)
        # Another optimizer's layers may have trained already: of those only what was masked is as it was at first.
        dense = self.dense_weights()
        for layer, first in zip(self._layers, self._initial, strict=True):
            now = dense[layer.name]
            layer.local.copy_(torch.where(now == 0.0, first, now))
        self._initial = [w for layer, w in zip(self._layers, self._initial, strict=True) if layer not in unused]
        self._leave_out(unused)
        self._show_all()

    def _leave_out(self, out: Sequence[Layer]) -> None:
        trainers = {id(layer): (bucket.optimizer, bucket.group) for bucket in self._buckets for layer in bucket.layers}
        self._layers, self.budget = list(self._chosen), self._whole_budget
        for layer in out:
            index = self._layers.index(layer)
            if self.budget is not None:
                self.budget = self.budget.without(index, layer.size)
            del self._layers[index]
        if self.budget is not None:
            check_feasible(self.budget, [layer.least for layer in self._layers])
        self._relayer()
        self._rebuild([trainers.get(id(layer), (None, None)) for layer in self._layers])
        for part in self._parts:
            part.find_buckets()

    def _notice(self, bucket: Bucket) -> None:
        """Weights that were written by somebody else, found before a step or at the end."""
        if self._changed(bucket):
            self._tell("changed", notices.CHANGED)
        if bucket.marks() != bucket.seen:
            self._sound = True  # until they are looked at
            bucket.seen = bucket.marks()

    def _unattached(self, optimizer: Optimizer) -> None:
        """An optimizer that was not given to :meth:`attach` has stepped."""
        if self._finalized or optimizer in self._known:
            return
        self._known.add(optimizer)
        held = owners.held(optimizer, self._layers)
        if held:
            self._tell("unattached", notices.unattached(optimizer, held, self))

    def _tell(self, about: str, message: str) -> None:
        """Warn, once about each thing."""
        if about not in self._told:
            self._told.add(about)
            warnings.warn(message, stacklevel=2)

    def _detach(self) -> None:
        for part in self._parts:
            part.attachment.remove()
            self._known.difference_update(part.attachment.all)
        self._parts = []
        owners.let_go(self)
