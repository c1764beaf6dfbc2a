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
from rarefy._prices import Prices

#: Those of :func:`rarefy.engine.compile`.
_PRECISIONS = ("float32", "bfloat16", "int8")


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
        try:
            layers = tuple(
                LayerLatency(
                    _of(str, layer["name"]),
                    _whole(layer["weights"]),
                    tuple(map(_number, _of((list, tuple), layer["densities"]))),
                    tuple(map(_number, _of((list, tuple), layer["seconds"]))),
                )
                for layer in _of((list, tuple), given["layers"])
            )
            rows, columns = map(_whole, _of((list, tuple), given["block"]))
            precision, about = _of(str, given["precision"]), dict(_of(Mapping, given["about"]))
            found = cls(layers, _number(given["fixed"]), precision, (rows, columns), about)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a table of latencies: {type(error).__name__}: {error}") from None
        if not layers or found.precision not in _PRECISIONS:
            raise ValueError(f"not a table of latencies: precision={found.precision!r} and {len(layers)} layers")
        for layer in layers:
            steps = layer.densities, layer.seconds
            rising = all(list(each) == sorted(each) and all(map(math.isfinite, each)) for each in steps)
            ends = layer.densities[:1] == (0.0,) and layer.densities[-1:] == (1.0,)
            if not rising or not ends or len(layer.densities) != len(layer.seconds) or layer.seconds[0] < 0:
                raise ValueError(
                    f"not a table of latencies: layer {layer.name!r} needs densities from 0 to 1 and as many seconds, "
                    f"both rising; got {layer.densities} and {layer.seconds}"
                )
        if not math.isfinite(found.fixed) or found.fixed < 0:
            raise ValueError(f"not a table of latencies: fixed={found.fixed}")
        return found

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file. Raises OSError where that cannot be written."""
        text = json.dumps(self.to_dict(), indent=1)
        write_atomically(Path(path), lambda beside: beside.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Latency:
        """Return what :meth:`save` wrote. Raises ValueError for another file, FileNotFoundError without one."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(given)
        except (ValueError, RecursionError) as error:  # what is no text and no JSON, too
            why = str(error).removeprefix("not a table of latencies: ")
            raise ValueError(f"{path} is not a table of latencies: {why}") from None


def _of(kinds: type | tuple[type, ...], value: Any) -> Any:
    """The value, if it is of this kind. Raises TypeError for another; a truth value is no number."""
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    raise TypeError(f"there is {value!r:.80}")


def _number(value: Any) -> float:
    return float(_of((int, float), value))


def _whole(value: Any) -> int:
    if _of(int, value) not in range(1, 1 << 53):
        raise ValueError(f"{value!r:.80} is not in [1, 2^53)")
    return int(value)
