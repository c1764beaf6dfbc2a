"""Engines of one model for several sizes of its inputs, called as one."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from rarefy.engine.engine import Engine

_LOG = logging.getLogger("rarefy.engine")
_Sizes: TypeAlias = tuple[tuple[int, ...], ...]


class Engines:
    """Engines of one model, one for each size of its inputs beside the batch; called like one, from any thread.

    ``compile(model, example_input, shapes=4)`` makes one that compiles for another size when it first comes, which
    takes as long as the first time and is logged; so many are kept, each with weights of its own, and the one that was
    used least recently goes. Made of loaded engines it takes their sizes alone.

    Args:
        engines: what there is; the last one is the one used last.
        shapes: how many are kept; None for those given.
        make: the engine for these tensors; None where none is made.

    Raises:
        ValueError: there is none, or more than ``shapes``; two are of the same size, or are called differently.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        shapes: int | None = None,
        make: Callable[[tuple[Tensor, ...]], Engine] | None = None,
    ) -> None:
        self._shapes, self._make = len(engines) if shapes is None else shapes, make
        self._engines = OrderedDict((_sizes_of(each), each) for each in engines)
        if not 1 <= len(engines) <= self._shapes:
            raise ValueError(f"there must be 1 to {self._shapes} engines, got {len(engines)}")
        if len(self._engines) < len(engines):
            raise ValueError("two engines are of the same size: give one for each")
        first = engines[0]
        for each in engines:
            kinds = [[port.dtype for port in one.inputs] for one in (first, each)]
            if kinds[0] != kinds[1] or each.takes != first.takes:
                raise ValueError(
                    "the engines are called differently: they must be of one model and one kind of example"
                )
        self._looking, self._making = threading.Lock(), threading.Lock()

    def __reduce__(self) -> Any:
        return _again, (self.engines, self._shapes, self._make)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that there are, the one used last at the end."""
        with self._looking:
            return tuple(self._engines.values())

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Compute the model's output, as an engine does; a size that is new compiles first.

        Raises as an engine does, and as :func:`rarefy.engine.compile` where the model does not take the size.
        """
        one = next(iter(self._engines.values()))
        given = one.tensors(inputs, named)
        engine = self._find(given) or self._made(given)
        return engine.result(engine.flat(given))

    def _find(self, given: Sequence[Any]) -> Engine | None:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in given]
        with self._looking:
            # An engine takes any batch, or one.
            for sizes in (tuple(shape[1:] for shape in shapes), tuple(shapes)):
                if (found := self._engines.get(sizes)) is not None:
                    self._engines.move_to_end(sizes)
                    return found
        return None

    def _made(self, given: Sequence[Any]) -> Engine:
        """The engine of a size that is new; another thread may have made it meanwhile."""
        one = self.engines[-1]
        fits = [
            isinstance(x, Tensor) and x.dtype == port.dtype and x.dim() == len(port.shape) and x.numel() and x.is_cpu
            for x, port in zip(given, one.inputs, strict=False)
        ]
        if self._make is None or len(fits) < max(len(given), len(one.inputs)) or not all(fits):
            one.flat(given)  # which says what is wrong
        with self._making:
            if (found := self._find(given)) is not None:
                return found
            assert self._make is not None
            made = self._make(tuple(given))
            with self._looking:
                dropped = [self._engines.popitem(last=False)[1] for _ in range(len(self._engines) + 1 - self._shapes)]
                self._engines[_sizes_of(made)] = made
                kept = len(self._engines)
        _LOG.warning(
            "compiled an engine for the new shapes %s in %.1f s; %d of at most %d are kept%s",
            ", ".join(str(tuple(x.shape)) for x in given),
            made.report.seconds,
            kept,
            self._shapes,
            "".join(f", that of {', '.join(str(port.shape) for port in each.inputs)} is gone" for each in dropped),
        )
        return made


def _sizes_of(engine: Engine) -> _Sizes:
    """By what an engine is found: its shapes, without a batch that may be any."""
    return tuple(port.shape[1:] if engine.batch is None else port.shape for port in engine.inputs)


def _again(engines: Sequence[Engine], shapes: int, make: Callable[[tuple[Tensor, ...]], Engine] | None) -> Engines:
    return Engines(engines, shapes=shapes, make=make)
