"""Engines into files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy._files import write_atomically
from rarefy.engine import int8
from rarefy.engine.building import NativeSegment
from rarefy.engine.building_int8 import Int8Segment
from rarefy.engine.dry_run import check_target
from rarefy.engine.eager import Eager
from rarefy.engine.engine import Engine, Port
from rarefy.engine.file.format import ALIGNMENT, DTYPES, HEAD, MAGIC, PROGRAM_HEAD, VERSION, Json, check_runs, meanings
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import Operator, Places, Quantized, Ref
from rarefy.engine.shapes import Engines


def save(engine: Engine, path: str | Path) -> None:
    """Write an engine to a file, in the place of what is there.

    Raises ValueError, before anything is written, where PyTorch runs an operator for it that is not its own or ours
    (such a name would mean nothing where the file is loaded), or one whose result's shape depends on numbers in it
    (that cannot be checked when it is loaded).
    """
    if not isinstance(engine, Engine):
        raise TypeError(f"save takes an engine, got {type(engine).__name__}: {_instead(engine)}")
    writer = _Writer()
    items, quantization = [writer.item(item) for item in engine._items], engine.report.quantization
    check_runs(engine)
    header = {
        "torch": torch.__version__,
        "inputs": [_port(port) for port in engine.inputs],
        "outputs": [_port(port) for port in engine.outputs],
        "takes": engine.takes.json(),
        "gives": engine.gives.json(),
        "batch": engine.batch,
        "fixed_because": engine._fixed_because,
        "items": items,
        "constants": {name: writer.tensor(tensor) for name, tensor in engine._constants.items()},
        "names": engine._names,
        "layers": {name: asdict(facts) for name, facts in engine._layers.items()},
        "reasons": engine._reasons,
        "threads": engine.threads,
        "report": asdict(engine.report) | {"quantization": None if quantization is None else quantization.to_dict()},
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    checksum = hashlib.sha256(text)
    for blob in writer.summed:
        checksum.update(blob)
    head = HEAD.pack(MAGIC, VERSION, 0, HEAD.size + len(text) + writer.size, len(text), checksum.digest())

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for blob in (head, text, *writer.blobs):
                file.write(blob)

    write_atomically(Path(path), fill)


def _instead(given: object) -> str:
    several = isinstance(given, Engines)
    return "save each of its engines" if several else "engine.compile(model, example) makes one"


class _Writer:
    """Collects blobs, and gives their places; ``summed`` is what counts of them for the file's checksum."""

    def __init__(self) -> None:
        self.blobs: list[bytes | bytearray | memoryview] = []
        self.summed: list[bytes | bytearray | memoryview] = []
        self.size = 0

    def add(self, blob: bytes | bytearray | memoryview, *, program: bool = False) -> list[int]:
        """Where the blob will lie behind the header: offset and size."""
        place = [self.size, len(blob)]
        padding = bytes(-len(blob) % ALIGNMENT)
        self.blobs += [blob, padding]
        self.summed += [blob[:PROGRAM_HEAD] if program else blob, padding]
        self.size += len(blob) + len(padding)
        return place

    def tensor(self, tensor: Tensor) -> Json:
        """A tensor as JSON, its numbers in a blob; or those that are not zero, and a bit for each in another."""
        last = tensor.dim() == 4 and not tensor.is_contiguous()
        numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"a tensor of {tensor.dtype} cannot be saved")
        about = {"shape": list(tensor.shape), "dtype": name, "last": last}
        if tensor.dtype is torch.int8:  # weights of layers on bytes, which are copied when they are read
            mask, kept = np.packbits(numbers != 0), numbers[numbers != 0]
            if len(mask) + len(kept) < len(numbers):
                return {**about, "place": self.add(kept.data), "mask": self.add(mask.data)}
        return {**about, "place": self.add(numbers.data)}

    def value(self, value: Any) -> Json:
        """An argument or a field of a step as JSON. Raises ValueError for what has no such form."""
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Ref):
            return {"ref": value.name}
        if isinstance(value, Places):
            return {"places": [value.value, value.numbers, list(value.strides), value.offset]}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.memory_format):
            return {"memory_format": str(value).removeprefix("torch.")}
        if value == torch.strided:
            return {"layout": "strided"}
        if value == torch.device("cpu"):
            return {"device": "cpu"}
        if isinstance(value, Mapping):
            return {"mapping": {name: self.value(each) for name, each in value.items()}}
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, tuple):
            return {"tuple": [self.value(each) for each in value]}
        raise ValueError(f"an argument of type {type(value).__name__} cannot be saved: {value!r}")

    def item(self, item: Item) -> Json:
        """An item of an engine as JSON."""
        if isinstance(item, Int8Segment):
            return {"int8": self._int8(item)}
        if isinstance(item, NativeSegment):
            ports = {name: [asdict(port) for port in getattr(item, name)] for name in ("inputs", "outputs")}
            return {
                "program": self.add(item.program.save(), program=True),
                **ports,
                "steps": list(item.steps),
                "rows": item.rows,
            }
        if isinstance(item, Eager):
            raise ValueError(
                "this engine runs the model itself, since nothing made of its graph is as fast: save the model, or "
                'compile it with choose="native" or "torch" for an engine that can be saved'
            )
        if isinstance(item, Operator):
            check_target(item.target)
        if isinstance(item, PackedConv):
            return {**self.item(item.step), "packed": list(item.shape)}
        if isinstance(item, Int8):
            return {**self.item(int8.packed(item.step)), "quantized": [_bytes(of) for of in meanings(item)]}
        about = {each.name: self.value(getattr(item, each.name)) for each in fields(item)}
        return {"step": type(item).__name__, "fields": about}

    def _int8(self, segment: Int8Segment) -> Json:
        """What an int8 program is made of: its steps, and what is known of their values."""
        source, options = segment.source, segment.options
        return {
            "steps": [self.item(int8.item(source, int8.unpacked(step))) for step in source.steps],
            "outputs": list(source.outputs),
            "values": {
                name: [*(None if sizes is None else list(sizes) for sizes in (v.shape, v.inner)), v.rows, v.fold]
                for name, v in source.values.items()
            },
            "batch": source.batch,
            "shapes": {name: list(shape) for name, shape in options.shapes.items()},
            "threads": options.threads,
            "samples": options.samples,
            "layouts": dict(options.layouts),
        }


def _bytes(of: Quantized | None) -> Json:
    return None if of is None else [of.scale, of.zero_point]


def _port(port: Port) -> Json:
    return {"name": port.name, "shape": list(port.shape), "dtype": str(port.dtype).removeprefix("torch.")}
