"""The engine: a compiled network that is called like the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine.building import NativeSegment, samples
from rarefy.engine.eager import Eager
from rarefy.engine.execute import Runner, most_in_torch, torch_threads
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, uses
from rarefy.engine.measure import LayerFacts
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import Affine, Binary, Concat, Conv, GlobalAverage, Linear, Pool
from rarefy.engine.profile import Profile, profile
from rarefy.engine.quantization import Quantization
from rarefy.engine.steps import StepInfo, steps
from rarefy.engine.structure import Call, Node

#: So long calls are timed at least: a few short ones tell little.
_LEAST_SECONDS = 0.005


@dataclass(frozen=True)
class Port:
    """An input or output of an engine: its shape on the example, batch and all, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Report:
    """How an engine was made.

    Attributes:
        seconds: what compiling took, all in all.
        measuring_seconds: the part of it that went into measuring which kernel is fastest.
        chosen: what runs the network: "native", "native by rule" (kernels chosen without measuring), "PyTorch",
            "PyTorch, oneDNN", "native and PyTorch" (some layers by PyTorch), "eager" (the model as it is), or
            "torch.compile".
        candidates: seconds of each of these on the example, where they were measured.
        precision: "float32", "bfloat16" (of weights) or "int8".
        weight_bytes: weights, biases and indices in memory.
        scratch_bytes: memory of one running thread of the largest native program, at the batch of the example.
        quantization: what int8 costs, layer by layer; None in another precision.
    """

    seconds: float
    measuring_seconds: float
    chosen: str
    candidates: Mapping[str, float]
    precision: str
    weight_bytes: int
    scratch_bytes: int
    quantization: Quantization | None = None


class Engine:
    """A network as :func:`compile` or :func:`load` makes it; called like the model, from any number of threads.

    ``inputs`` and ``outputs`` tell what it takes and gives; ``report`` how it was made.
    """

    def __init__(
        self,
        *,
        items: Sequence[Item],
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        takes: Call,
        gives: Node,
        batch: int | None,
        fixed_because: str | None,
        constants: Mapping[str, Tensor],
        names: Mapping[str, str],
        layers: Mapping[str, LayerFacts],
        reasons: Mapping[str, str],
        threads: int | None,
        report: Report,
    ) -> None:
        self.inputs, self.outputs, self.report, self.threads = tuple(inputs), tuple(outputs), report, threads
        self.batch, self._fixed_because = batch, fixed_because
        self.takes, self.gives = takes, gives
        self._items, self._constants = tuple(items), dict(constants)
        self._names, self._layers, self._reasons = dict(names), dict(layers), dict(reasons)
        names_in, names_out = ([port.name for port in ports] for ports in (self.inputs, self.outputs))
        self._runner = Runner(items, names_in, names_out, constants)
        self._plain = takes.is_plain
        made = [name for item in items if _makes_new(item) for name in uses(item)[1]]
        #: The outputs that may share memory with something else, and the memory that is the engine's own.
        self._views = [i for i, name in enumerate(names_out) if name not in made or name in names_out[:i]]
        self._own = self._own_memory()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._own = self._own_memory()  # a copy's lies elsewhere

    def _own_memory(self) -> set[int | None]:
        held = [x for item in self._items if isinstance(item, Eager) for x in item.tensors()]
        return {_memory(x) for x in (*self._constants.values(), *held)}

    @property
    def compile_seconds(self) -> float:
        """What compiling took, measuring included."""
        return self.report.seconds

    @property
    def measuring_seconds(self) -> float:
        """What measuring the kernels took."""
        return self.report.measuring_seconds

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Compute the model's output for these inputs, of any batch size (see ``batch``), without gradient.

        It takes what the model takes, by position or by name, and gives what the model gives. What was no tensor in the
        example (None, a number, a string) must be the same here, or may be left out.

        Raises TypeError for an input that is no tensor of the dtype compiled for, or is missing, ValueError for another
        shape.
        """
        if torch.compiler.is_compiling():  # which finds no graph in here; without it the wrapper costs too much
            return _uncompiled(self, inputs, named)
        return self.result(self.flat(self.tensors(inputs, named)))

    def tensors(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
        """The tensors of a call, one for each of ``inputs``; raises TypeError where it is not like the example."""
        return inputs if self._plain and not named else self.takes.tensors(inputs, named)

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """What the model gives, made of the output's tensors."""
        return outputs[0] if self.gives.kind == "tensor" else self.gives.build(iter(outputs))

    def flat(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the output's tensors, and numbers as tensors, in order, from one for each of ``inputs``."""
        if torch.is_autocast_enabled("cpu"):  # it is for training: an engine has its precision
            with torch.autocast("cpu", enabled=False):
                return self.flat(inputs)
        now = torch.get_num_threads()
        threads = self.threads or now
        if now != most_in_torch(threads):
            with torch_threads(threads):
                return self._computed(inputs, threads)
        return self._computed(inputs, threads)

    def _computed(self, inputs: Sequence[Tensor], threads: int) -> tuple[Tensor, ...]:
        given = self._checked(inputs)
        if not torch.is_grad_enabled():
            return self._apart(inputs, self._runner(given, threads))
        torch._C._set_grad_enabled(False)  # torch.no_grad(), which takes as long as half a small layer
        try:
            outputs = self._runner(given, threads)
        finally:
            torch._C._set_grad_enabled(True)
        return self._apart(inputs, outputs)

    def _apart(self, inputs: Sequence[Tensor], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, each in memory of its own: a caller may change it in place, and change nothing else."""
        if not self._views:
            return outputs
        # Programs and layers give new memory; what else shares any is copied.
        taken = self._own | {_memory(x) for x in inputs}
        taken |= {_memory(outputs[i]) for i in range(len(outputs)) if i not in self._views}
        found = list(outputs)
        for i in self._views:
            if (where := _memory(found[i])) in taken:
                found[i] = found[i].clone()
            taken.add(where)
        return tuple(found)

    def profile(self, *inputs: Tensor, rounds: int = 21) -> Profile:
        """Time every step on one thread (see :class:`rarefy.engine.profile.Profile`).

        ``inputs`` are what to run on, a tensor for each of the engine's ``inputs``; without them, random numbers of the
        example's shapes. Every figure is the median of ``rounds`` runs.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        given = self._checked(inputs or self.example())
        batch = samples(given[0].shape)
        with torch.no_grad(), torch_threads(1):
            took = self._runner.timed(given, rounds)
        return profile(self.steps(), took, batch)

    def seconds(self, *inputs: Tensor, rounds: int = 21) -> float:
        """Time whole calls on one thread, by its processor time: the median of ``rounds``, or more of short ones.

        ``inputs`` are as those of :meth:`profile`.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        given = inputs or self.example()
        found: list[float] = []
        with torch.no_grad(), torch_threads(1):
            self._runner(self._checked(given), 1)
            while len(found) < rounds or sum(found) < _LEAST_SECONDS:
                begun = time.thread_time()
                self._apart(given, self._runner(self._checked(given), 1))
                found.append(time.thread_time() - begun)
        return median(found)

    def steps(self) -> list[StepInfo]:
        """List what runs, step by step, and by which kernel (see :class:`rarefy.engine.StepInfo`)."""
        return steps(self._items, self._names, self._layers, self._reasons)

    def example(self) -> tuple[Tensor, ...]:
        """Make random tensors of the shapes that it was compiled for, one for each of ``inputs``."""
        chance = torch.Generator("cpu").manual_seed(0)  # PyTorch's own is the caller's
        return tuple(
            torch.randn(port.shape, generator=chance, dtype=port.dtype, device="cpu")
            if port.dtype.is_floating_point
            else torch.zeros(port.shape, dtype=port.dtype, device="cpu")
            for port in self.inputs
        )

    def _checked(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, as the items take them."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"the engine takes {len(self.inputs)} inputs, got {len(inputs)}")
        given = [self._input(x, port) for x, port in zip(inputs, self.inputs, strict=True)]
        if self.batch is None and len(given) > 1 and len(batches := {x.shape[0] for x in given}) > 1:
            raise ValueError(f"all inputs must have the same batch size, got {', '.join(map(str, sorted(batches)))}")
        return given

    def _input(self, x: Tensor, port: Port) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"input {port.name!r} must be a tensor, got {type(x).__name__}")
        if x.dtype != port.dtype:
            raise TypeError(f"input {port.name!r} must be {port.dtype}, got {x.dtype}: convert it first")
        if not x.is_cpu:
            raise ValueError(f"input {port.name!r} must be on the CPU, got {x.device}: call it with x.cpu()")
        if x.is_nested:  # which may have no shape
            raise ValueError(
                f"input {port.name!r} must be a plain tensor, got a nested one: pad it with "
                "torch.nested.to_padded_tensor()"
            )
        shape = x.shape
        if len(shape) != len(port.shape) or (port.shape and not self._fits(shape, port.shape)):
            raise self._wrong_shape(x, port)
        try:
            numbers = plain(x)
            kernels.address(numbers)
        except ValueError as error:
            raise ValueError(f"input {port.name!r}: {error}") from None
        return numbers

    def _fits(self, given: Sequence[int], expected: Sequence[int]) -> bool:
        batch = given[0] >= 1 if self.batch is None else given[0] == expected[0]
        return batch and given[1:] == expected[1:]

    def _wrong_shape(self, x: Tensor, port: Port) -> ValueError:
        batch = "batch" if self.batch is None else f"batch of {self.batch}"
        expected = (batch, *map(str, port.shape[1:])) if port.shape else ()
        given = tuple(x.shape)
        what = f"input {port.name!r} must have the shape ({', '.join(expected)}), got {given}"
        if len(given) != len(port.shape):
            return ValueError(what)
        if len(given) > 3 and given[1] != port.shape[1]:
            return ValueError(f"{what}: the model takes {port.shape[1]} channels")
        if given[1:] != port.shape[1:]:
            dtype = "" if port.dtype is torch.float32 else f", dtype={port.dtype}"
            precision, quantization = self.report.precision, self.report.quantization
            options = "" if precision == "float32" else f', precision="{precision}"'
            calibrated = quantization is not None and quantization.samples > 0  # a model may come quantised
            one = f"torch.zeros({given}{dtype})" if len(self.inputs) == 1 and self._plain else "an example of this size"
            more = (
                " and batches of this size" if calibrated else ", or compile with shapes=4, which makes up to 4 of them"
            )
            return ValueError(
                f"{what}: an engine runs at the size that it was compiled for; for this one make another, with "
                f"engine.compile(model, {one}{options}{', calibration=batches' * calibrated}){more}"
            )
        if self.batch is not None and given[:1] != port.shape[:1]:
            return ValueError(f"{what}: the model takes one batch size alone ({self._fixed_because})")
        return ValueError(f"{what}: the batch must not be empty")


@torch.compiler.disable
def _uncompiled(engine: Engine, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Call an engine from within code that is compiled."""
    return engine.result(engine.flat(engine.tensors(inputs, named)))


def plain(x: Tensor) -> Tensor:
    """The numbers of an input: without gradient, as they are when read, no subclass that changes what operators do."""
    if type(x) is Tensor and not (x.requires_grad or x.is_conj() or x.is_neg()):
        return x
    x = x.detach()
    if type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__:
        x = x.as_subclass(Tensor)
    return x.resolve_conj().resolve_neg() if x.layout is torch.strided else x


def _makes_new(item: Item) -> bool:
    """Whether what an item makes always lies in memory of its own."""
    layers = (NativeSegment, PackedConv, Int8, Conv, Linear, Binary, Pool, GlobalAverage, Concat)
    return isinstance(item, layers) or (isinstance(item, Affine) and item.activation != "none")


def _memory(x: Tensor) -> int | None:
    """Where the memory begins that a tensor is a view of."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else None
