"""What a network takes in the engine, by how many of its weights live: data that is measured once on a machine.

:func:`rarefy.engine.latency` measures it, and ``target_ms`` of the methods of :mod:`rarefy.sparse` trains to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rarefy._files import write_atomically
from rarefy._json import Fields, read_fields
from rarefy._prices import Prices

#: Those of :func:`rarefy.engine.compile`.
_PRECISIONS = ("float32", "bfloat16", "int8")

_ADVICE = "rarefy.engine.latency measures a table of latencies anew"


@dataclass(frozen=True)
class LayerLatency:
    """One layer at some densities.

    Attributes:
        name: of its weight, without ``.weight`` at the end, as in :class:`rarefy.sparse.LayerState`.
        weights: how many it has.
        densities: the shares of them that live, rising from 0 to 1.
        seconds: what it takes at each, never falling; straight lines lie between them.
    """

    name: str
    weights: int
    densities: tuple[float, ...]
    seconds: tuple[float, ...]

    def prices(self, block: int) -> Prices:
        """What its live weights take beyond the first of ``seconds``; prices change between blocks of so many."""
        counts = [block * round(density * self.weights / block) for density in self.densities[1:-1]]
        # Where a small layer has one count at two densities the last holds, but for the ends.
        known = dict(zip([*counts, self.weights, 0], [*self.seconds[1:], self.seconds[0]], strict=True))
        known = dict(sorted(known.items()))
        return Prices.between(list(known), list(known.values()))


@dataclass(frozen=True)
class Latency:
    """What a network takes in the engine on one thread, as :func:`rarefy.engine.latency` measured it.

    It holds for the machine, the build and the example that it was measured with.

    Attributes:
        layers: those whose weights the engine's time depends on.
        fixed: seconds of everything else.
        precision: as in :func:`rarefy.engine.compile`.
        block: in blocks of how many outputs and inputs the weights live, as the methods' ``block``.
        about: where it was measured: processor, instruction set, versions, date, shape of the example.
    """

    layers: tuple[LayerLatency, ...]
    fixed: float
    precision: str
    block: tuple[int, int]
    about: Mapping[str, Any]

    @cached_property
    def _prices(self) -> dict[str, Prices]:
        return {layer.name: layer.prices(math.prod(self.block)) for layer in self.layers}

    def seconds(self, live: Mapping[str, int] | None = None) -> float:
        """Return what the network takes with so many live weights in these layers, by name, and all in the others.

        Raises ValueError for a name that is no layer, and for more weights than it has; TypeError for no mapping.
        """
        given = {} if live is None else live
        if not isinstance(given, Mapping):
            raise TypeError(
                "live must be a mapping of layers' names to numbers of weights, such as {layer.name: layer.live}, got "
                f"{given!r:.80}"
            )
        for name, count in given.items():
            size = self._prices[name].size if name in self._prices else None
            if size is None or isinstance(count, float) or not 0 <= count <= size:
                there = ", ".join(self._prices) if size is None else f"with {size} weights"
                raise ValueError(f"{count} live weights in {name!r}: there is {there}")
        counts = {name: given.get(name, prices.size) for name, prices in self._prices.items()}
        taken = (layer.seconds[0] + self._prices[layer.name].cost(counts[layer.name]) for layer in self.layers)
        return self.fixed + math.fsum(taken)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings, lists and dicts, ready for JSON."""
        return {**asdict(self), "about": dict(self.about)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Latency:
        """Return what :meth:`to_dict` gave. Raises ValueError for anything else."""
        return cls._read(Fields(given, "the table of latencies", _ADVICE))

    @classmethod
    def _read(cls, given: Fields) -> Latency:
        layers = tuple(
            layer.read(LayerLatency, densities=layer.numbers("densities"), seconds=layer.numbers("seconds"))
            for layer in given.objects("layers")
        )
        sides, about = given.numbers("block"), given.value.get("about")
        block = tuple(int(side) for side in sides if side.is_integer() and side >= 1)
        found = given.read(cls, layers=layers, block=block, about=about)
        if not layers or found.precision not in _PRECISIONS or not len(sides) == len(block) == 2:
            raise given.wrong(
                f"needs layers, a precision of {', '.join(_PRECISIONS)} and a block of two sides, got {len(layers)} "
                f"layers, {found.precision!r:.80} and {sides}"
            )
        if found.fixed < 0 or not isinstance(about, Mapping):
            raise given.wrong(
                f"needs seconds that are not negative and an object about, got {found.fixed}, {about!r:.80}"
            )
        for layer in layers:
            rising = all(list(each) == sorted(each) for each in (layer.densities, layer.seconds))
            ends = layer.densities[:1] == (0.0,) and layer.densities[-1:] == (1.0,)
            counted = 1 <= layer.weights < 1 << 53 and len(layer.densities) == len(layer.seconds)
            if not rising or not ends or not counted or layer.seconds[0] < 0:
                raise given.wrong(
                    f"layer {layer.name!r:.80} needs weights, densities from 0 to 1 and as many seconds, both rising; "
                    f"got {layer.weights}, {layer.densities} and {layer.seconds}"
                )
        return found

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file. Raises OSError where that cannot be written."""
        text = json.dumps(self.to_dict(), indent=1)
        write_atomically(Path(path), lambda beside: beside.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Latency:
        """Return what :meth:`save` wrote. Raises ValueError for another file, FileNotFoundError without one."""
        return cls._read(read_fields(Path(path), _ADVICE))
