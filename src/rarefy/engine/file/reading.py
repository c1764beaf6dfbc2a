"""Engines out of files, of which nothing is believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine import binding, int8, plan, programs
from rarefy.engine.builder import LAYOUTS
from rarefy.engine.building import INTEGERS, NativeSegment, Options, SegmentPort
from rarefy.engine.building_int8 import again
from rarefy.engine.dry_run import LARGEST_INTEGER, check_conv, check_target
from rarefy.engine.engine import Engine, Port, Report
from rarefy.engine.explicit import on_cpu
from rarefy.engine.file.format import (
    ALIGNMENT,
    DTYPES,
    HEAD,
    MAGIC,
    MEMORY_FORMATS,
    VERSION,
    Json,
    check_runs,
    checksum,
    meanings,
    sizes,
)
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, uses
from rarefy.engine.measure import LayerFacts
from rarefy.engine.onednn import packed
from rarefy.engine.plan import Conv, Operator, Places, Plan, Quantized, Ref, Step, Value
from rarefy.engine.quantization import Quantization
from rarefy.engine.structure import read, read_call

_STEPS: dict[str, type[Step]] = {kind.__name__: kind for kind in (*plan.NATIVE, *plan.INT8, plan.Operator)}


def load(path: str | Path, *, mmap: bool = False, classes: Sequence[type] = ()) -> Engine:
    """Load the engine of a file that :func:`save` wrote.

    A file names the dataclasses and named tuples that the model takes or gives, and nothing is imported for it: those
    of ``classes`` are made again, and so are transformers' outputs where transformers is imported; a dict stands for
    another, and a warning says so.

    With ``mmap`` its weights stay in the file, mapped into memory that all processes share. The file must then not
    change while the engine is used: other weights in it would be computed with, and one that is cut off ends the
    process. To replace it, rename another into its place, as :func:`save` does; do not copy over it.

    Raises ValueError for a file that is no engine, cut off or altered, of another version, or with native programs
    where there is no native library; OSError for one that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no engine {path}: engine.save(engine, path) writes one")
    with path.open("rb") as file:  # once: another file may be put in its place at any time
        size = os.fstat(file.fileno()).st_size
        if size < HEAD.size:
            raise ValueError(_damaged(path, "it is too short"))
        data = np.memmap(file, np.uint8, "c") if mmap else _copied(path, file, size)
    magic, version, reserved, whole, length, digest = HEAD.unpack(data[: HEAD.size].tobytes())
    if magic != MAGIC:
        raise ValueError(f"{path} is not an engine: engine.save(engine, path) writes one")
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format, this rarefy reads {VERSION}: compile it again")
    if whole != size or length % ALIGNMENT or HEAD.size + length > size:
        raise ValueError(_damaged(path, f"it has {size} bytes and should have {whole}"))
    text, blobs = data[HEAD.size : HEAD.size + length].tobytes(), data[HEAD.size + length :]
    try:
        header = json.loads(text)
        if reserved or checksum(text, blobs.data, header) != digest:
            raise ValueError("its checksum is wrong")
        if not binding.available() and any("program" in item for item in header["items"]):
            raise _UnusableError(
                f"{path} holds native programs, and there is no native engine here (rarefy info says why): "
                "compile the model again"
            )
        with on_cpu():
            return _Reader(blobs, classes).engine(header)
    except _UnusableError:
        raise
    except Exception as error:  # there is no end to what a reader stumbles over in a forged file
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from error


def _copied(path: Path, file: BufferedReader, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    memory = programs.aligned(size)
    if file.readinto(memory.data) != size:
        raise ValueError(_damaged(path, "it became shorter while it was read"))
    return memory


class _UnusableError(ValueError):
    """A whole file that cannot be used here."""


def _damaged(path: Path, why: str) -> str:
    return f"{path} is cut off, altered or not an engine ({why}): compile the model again, or copy the file again"


class _Reader:
    """Makes an engine of a header and the blobs behind it; raises whatever comes of a header that is not right."""

    def __init__(self, blobs: np.ndarray[Any, np.dtype[np.uint8]], classes: Sequence[type]) -> None:
        self.blobs, self.classes = blobs, classes

    def engine(self, header: Mapping[str, Json]) -> Engine:
        """The engine."""
        items = [item for about in header["items"] for item in self._items(about)]
        inputs, outputs = ([self._engine_port(about) for about in header[name]] for name in ("inputs", "outputs"))
        constants = {str(name): self._tensor(about) for name, about in header["constants"].items()}
        known: set[str] = set()
        for reads, makes in [((), tuple(constants)), ((), tuple(port.name for port in inputs)), *map(uses, items)]:
            if not known.issuperset(reads):
                raise ValueError(f"a step reads {sorted({*reads} - known)}, which nothing makes")
            if len(known.union(makes)) < len(known) + len(makes):
                raise ValueError(f"one of {sorted(makes)} is made twice")
            known.update(makes)
        if not outputs or not known.issuperset(port.name for port in outputs):
            raise ValueError("nothing makes an output")
        engine = Engine(
            items=items,
            inputs=inputs,
            outputs=outputs,
            takes=read_call(header["takes"], self.classes),
            gives=read(header["gives"], self.classes),
            batch=header["batch"],
            fixed_because=header["fixed_because"],
            constants=constants,
            names=_texts(header["names"]),
            layers={name: LayerFacts(**facts) for name, facts in header["layers"].items()},
            reasons=_texts(header["reasons"]),
            threads=header["threads"],
            report=_report(header["report"]),
        )
        self._check_facts(engine)
        check_runs(engine)
        return engine

    def _check_facts(self, engine: Engine) -> None:
        """Raise ValueError where what is not computed with, only told or looked at, is of another kind."""
        report, because = engine.report, engine._fixed_because
        given = [*engine.gives.kinds()]
        if engine.takes.leaves != len(engine.inputs) or len(given) != len(engine.outputs):
            raise ValueError("there are more inputs or outputs than tensors, or less")
        if any(kind == "number" and port.shape for kind, port in zip(given, engine.outputs, strict=True)):
            raise ValueError("an output is no number")
        for number, largest in ((engine.batch, LARGEST_INTEGER), (engine.threads, programs.MOST_THREADS)):
            if number is not None and not (type(number) is int and 1 <= number <= largest):
                raise ValueError(f"a batch or a number of threads is {number!r:.80}")
        if not all(isinstance(each, str) for each in (report.chosen, report.precision, because or "")):
            raise ValueError("a text is none")
        numbers = [report.seconds, report.measuring_seconds, report.weight_bytes, report.scratch_bytes]
        numbers += [
            *dict(report.candidates).values(),
            *(item.rows for item in engine._items if isinstance(item, NativeSegment)),
        ]
        for facts in engine._layers.values():
            numbers += [each for each in vars(facts).values() if each is not None]
        if not all(type(each) in (int, float) and 0 <= each <= 1 << 62 for each in numbers):
            raise ValueError("a number of the report is none")
        if any(facts.dense_macs < facts.macs or facts.weights < facts.nonzeros for facts in engine._layers.values()):
            raise ValueError("a layer has more nonzeros than weights")

    def _engine_port(self, about: Json) -> Port:
        shape = sizes(about["shape"])
        if math.prod(shape) > LARGEST_INTEGER:
            raise ValueError(f"an input or output has the shape {shape}")
        return Port(_text(about["name"]), shape, DTYPES[about["dtype"]])

    def _blob(self, place: Json) -> np.ndarray[Any, np.dtype[np.uint8]]:
        offset, size = sizes(place)
        if offset < 0 or size < 0 or offset % ALIGNMENT or offset + size > len(self.blobs):
            raise ValueError(f"nothing lies at {offset}")
        return self.blobs[offset : offset + size]

    def _tensor(self, about: Json) -> Tensor:
        dtype, shape = DTYPES[about["dtype"]], sizes(about["shape"])
        numbers, size = self._blob(about["place"]), math.prod(shape) * dtype.itemsize
        if "mask" in about:
            numbers = _spread(numbers, self._blob(about["mask"]), size)
        if size != len(numbers):
            raise ValueError(f"a tensor of the shape {shape} has {len(numbers)} bytes")
        tensor = torch.from_numpy(numbers).view(dtype).reshape(shape)
        return tensor.contiguous(memory_format=torch.channels_last) if about["last"] else tensor

    def _items(self, about: Json) -> Sequence[Item]:
        return self._int8(about["int8"]) if "int8" in about else [self._item(about)]

    def _int8(self, about: Json) -> Sequence[Item]:
        """The int8 program, made again; without the native engine its steps, which PyTorch runs."""
        items: list[Int8] = []
        known: dict[str, Quantized | None] = {}
        native = binding.available()
        for each in about["steps"]:
            item = self._item(each)
            if not isinstance(item, Int8):
                raise ValueError("a step of an int8 program is none on bytes")
            names = (*item.inputs, item.output)
            for name, of in zip(names, meanings(item), strict=True):
                if known.setdefault(name, of) != of:
                    raise ValueError(f"the bytes of {name} mean two things")
            items.append(replace(item, step=int8.packed(item.step)) if native else item)
        if not native:
            return items
        made = {name for item in items for name in uses(item)[1]}
        values = {
            _text(name): Value(
                None if shape is None else sizes(shape),
                torch.float32 if known.get(name) is None else torch.uint8,
                _text(rows),
                known.get(name),
                fold=sizes([fold])[0] or 1,
                inner=None if inner is None else sizes(inner),
            )
            for name, (shape, inner, rows, fold) in about["values"].items()
        }
        source = Plan(
            inputs=tuple(dict.fromkeys(name for item in items for name in uses(item)[0] if name not in made)),
            outputs=tuple(map(_text, about["outputs"])),
            single=False,
            steps=tuple(item.step for item in items),
            values=values,
            constants={},
            batch=about["batch"],
        )
        shapes = {_text(name): sizes(shape) for name, shape in about["shapes"].items()}
        threads, samples = sizes([about["threads"], about["samples"]])
        if not 1 <= threads <= programs.MOST_THREADS or samples < 1:
            raise ValueError(f"it is for {threads} threads and {samples} samples")
        layouts = {_text(name): layout for name, layout in about["layouts"].items()}
        if not all(layout in LAYOUTS for layout in layouts.values()):
            raise ValueError(f"weights are taken in one of {', '.join(LAYOUTS)}, not in {layouts}")
        return [again(source, Options("measure", "float32", threads, 0.0, shapes, samples, layouts))]

    def _item(self, about: Json) -> Item:
        if "program" in about:
            program = programs.load(self._blob(about["program"]))
            ports = []
            for name, given in (("inputs", program.ports(outputs=False)), ("outputs", program.ports(outputs=True))):
                told = tuple(
                    SegmentPort(
                        _text(port["value"]),
                        sizes(port["shape"]),
                        fold=sizes([port["fold"]])[0],
                        integer=port["integer"],
                    )
                    for port in about[name]
                )
                if any(port.integer not in ({0} if name == "outputs" else {0, *INTEGERS}) for port in told) or [
                    port.numbers for port in told
                ] != [math.prod(shape) for shape, _ in given]:
                    raise ValueError(f"a program has other {name}")
                ports.append(told)
            steps = tuple(map(_text, about["steps"]))
            return NativeSegment(program, ports[0], ports[1], steps, about["rows"])
        kind = _STEPS[about["step"]]
        given_fields = {name: self._value(value) for name, value in about["fields"].items()}
        if kind is Operator:
            check_target(given_fields["target"])
        step = kind(**(_with_weights(given_fields) if "quantized" in about else given_fields))
        for text in (step.name, step.output, *step.inputs):
            _text(text)
        if "quantized" in about:
            *operands, result = (None if of is None else Quantized(*of) for of in about["quantized"])
            return Int8(step, tuple(operands), result)
        if "packed" not in about:
            return step
        if not isinstance(step, Conv):
            raise ValueError(f"a {about['step']} is not packed")
        shape = sizes(about["packed"])
        check_conv(step, shape)
        return packed(step, shape) or step

    def _value(self, value: Json) -> Any:
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((kind, given),) = value.items()
        match kind:
            case "float":
                return float(given)
            case "ref":
                return Ref(given)
            case "places":
                name, numbers, strides, offset = given
                counted, begin = sizes([numbers, offset])
                return Places(_text(name), counted, sizes(strides), begin)
            case "tensor":
                return self._tensor(given)
            case "dtype":
                return DTYPES[given]
            case "memory_format":
                return MEMORY_FORMATS[given]
            case "layout":
                return torch.strided
            case "device":
                return torch.device("cpu")
            case "mapping":
                return {name: self._value(each) for name, each in given.items()}
            case "tuple":
                return tuple(self._value(each) for each in given)
        raise ValueError(f"there is no argument of the kind {kind!r}")


def _with_weights(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a step in int8 from those that are stored."""
    if "weight" not in fields:
        return fields
    whole, scale = fields["weight"], fields["weight_scale"]
    if whole.dtype is not torch.int8 or scale.dtype is not torch.float32 or scale.shape != whole.shape[:1]:
        raise ValueError("weights are no whole numbers of 8 bits with a scale for each channel")
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError("a scale of weights is not above 0")
    return {**fields, "weight": int8.weights(whole, scale)}


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a name is {value!r:.80}")
    return value


def _texts(table: Json) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in table.items()}


def _report(about: Mapping[str, Any]) -> Report:
    given = about["quantization"]
    return Report(**{**about, "quantization": None if given is None else Quantization.from_dict(given)})


def _spread(
    numbers: np.ndarray[Any, np.dtype[np.uint8]], mask: np.ndarray[Any, np.dtype[np.uint8]], size: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """So many bytes: those given where a bit is set, zeros elsewhere."""
    if size < 0 or len(mask) != -(-size // 8):
        raise ValueError(f"{len(mask)} bytes of bits are for a tensor of {size} bytes")
    there = np.unpackbits(mask, count=size).astype(bool)
    if there.sum() != len(numbers):
        raise ValueError(f"{there.sum()} bits are set for {len(numbers)} bytes")
    found = np.zeros(size, np.uint8)
    found[there] = numbers
    return found
