"""An engine in one file: written whole or not at all, mapped into memory when it is loaded.

    bytes 0 to 63     magic, version, size of the file, size of the header, SHA-256 of all that follows
    from 64           the header, JSON: inputs and outputs, items in order, facts for the profile
    then              native programs and tensors, each at a multiple of 64

Nothing in a file is code: steps that PyTorch runs are named operators with plain arguments, of :data:`NAMESPACES` alone
and none that writes to its arguments or to files. Whoever can write a file can still make it compute something else.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rarefy._files import write_atomically
from rarefy.engine import native, plan, reference
from rarefy.engine.eager import Eager
from rarefy.engine.engine import Engine, Port, Report
from rarefy.engine.measure import LayerFacts
from rarefy.engine.onednn import Packed, packed
from rarefy.engine.plan import Conv, Operator, Ref, Step
from rarefy.engine.segments import Item, Segment, uses
from rarefy.engine.segments import Port as ProgramPort

VERSION = 1
#: Whose operators a file may name.
NAMESPACES = ("aten", "rarefy", "python")

_MAGIC = b"rarefy\x00e"
_HEAD = struct.Struct("<8sIIQQ32s")
_ALIGNMENT = 64
_UNSAFE = {"aten.from_file.default"}
_STEPS: dict[str, type[Step]] = {kind.__name__: kind for kind in (*plan.NATIVE, plan.Operator)}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.complex64, torch.complex128),
    )
}
_MEMORY_FORMATS = {
    str(each).removeprefix("torch."): each
    for each in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
_Json: TypeAlias = Any


class _Writer:
    """Collects blobs, and gives their places."""

    def __init__(self) -> None:
        self.blobs: list[bytes | bytearray | memoryview] = []
        self.size = 0

    def add(self, blob: bytes | bytearray | memoryview) -> list[int]:
        """Where the blob will lie behind the header: offset and size."""
        place = [self.size, len(blob)]
        padding = -len(blob) % _ALIGNMENT
        self.blobs += [blob, bytes(padding)]
        self.size += len(blob) + padding
        return place

    def tensor(self, tensor: Tensor) -> _Json:
        """A tensor as JSON, its numbers in a blob."""
        last = tensor.dim() == 4 and not tensor.is_contiguous()
        numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"a tensor of {tensor.dtype} cannot be saved")
        return {"shape": list(tensor.shape), "dtype": name, "place": self.add(numbers.data), "last": last}

    def value(self, value: Any) -> _Json:
        """An argument or a field of a step as JSON. Raises ValueError for what has no such form."""
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Ref):
            return {"ref": value.name}
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

    def item(self, item: Item) -> _Json:
        """An item of an engine as JSON."""
        if isinstance(item, Segment):
            ports = {name: [asdict(port) for port in getattr(item, name)] for name in ("inputs", "outputs")}
            return {"program": self.add(item.program.save()), **ports, "steps": list(item.steps), "rows": item.rows}
        if isinstance(item, Eager):
            raise ValueError(
                "this engine runs the model itself, since nothing made of its graph is as fast: save the model, or "
                'compile it with choose="native" or "torch" for an engine that can be saved'
            )
        if isinstance(item, Operator):
            _check_target(item.target)
        if isinstance(item, Packed):
            return {**self.item(item.step), "packed": list(item.shape)}
        about = {each.name: self.value(getattr(item, each.name)) for each in fields(item)}
        return {"step": type(item).__name__, "fields": about}


def save(engine: Engine, path: str | Path) -> None:
    """Write an engine to a file, in the place of what is there.

    Raises ValueError, before anything is written, where PyTorch runs an operator for it that is not its own or ours:
    such a name would mean nothing where the file is loaded.
    """
    if not isinstance(engine, Engine):
        raise TypeError(f"save takes an engine, got {type(engine).__name__}: engine.compile(model, example) makes one")
    writer = _Writer()
    header = {
        "torch": torch.__version__,
        "inputs": [_port(port) for port in engine.inputs],
        "outputs": [_port(port) for port in engine.outputs],
        "single": engine._single,
        "batch": engine.batch,
        "fixed_because": engine._fixed_because,
        "items": [writer.item(item) for item in engine._items],
        "constants": {name: writer.tensor(tensor) for name, tensor in engine._constants.items()},
        "names": engine._names,
        "layers": {name: asdict(facts) for name, facts in engine._layers.items()},
        "reasons": engine._reasons,
        "threads": engine.threads,
        "report": asdict(engine.report),
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256(text)
    for blob in writer.blobs:
        digest.update(blob)
    head = _HEAD.pack(_MAGIC, VERSION, 0, _HEAD.size + len(text) + writer.size, len(text), digest.digest())

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for blob in (head, text, *writer.blobs):
                file.write(blob)

    write_atomically(Path(path), fill)


def load(path: str | Path) -> Engine:
    """The engine of a file that :func:`save` wrote; its weights stay in the file, mapped into memory.

    Raises ValueError for a file that is no engine, cut off or altered, of another version, or with native programs
    where there is no native library.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < _HEAD.size:
        raise ValueError(_damaged(path, "it is too short"))
    data = np.memmap(path, np.uint8, "c")
    magic, version, _, whole, length, digest = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if magic != _MAGIC:
        raise ValueError(f"{path} is not an engine: engine.save(engine, path) writes one")
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format, this rarefy reads {VERSION}: compile it again")
    if whole != size or length % _ALIGNMENT or _HEAD.size + length > size:
        raise ValueError(_damaged(path, f"it has {size} bytes and should have {whole}"))
    if hashlib.sha256(data[_HEAD.size :].data).digest() != digest:
        raise ValueError(_damaged(path, "its checksum is wrong"))
    try:
        header = json.loads(data[_HEAD.size : _HEAD.size + length].tobytes())
        if not native.available() and any("program" in item for item in header["items"]):
            raise _UnusableError(
                f"{path} holds native programs, and there is no native engine here (rarefy info says why): "
                "compile the model again"
            )
        return _Reader(data[_HEAD.size + length :]).engine(header)
    except _UnusableError:
        raise
    except Exception as error:  # there is no end to what a reader stumbles over in a forged file
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from error


class _UnusableError(ValueError):
    """A whole file that cannot be used here."""


def _damaged(path: Path, why: str) -> str:
    return f"{path} is cut off, altered or not an engine ({why}): compile the model again, or copy the file again"


def _port(port: Port) -> _Json:
    return {"name": port.name, "shape": list(port.shape), "dtype": str(port.dtype).removeprefix("torch.")}


def _check_target(target: str) -> None:
    """Raise ValueError for an operator that a file may not name."""
    namespace = target.partition(".")[0]
    if namespace not in NAMESPACES or target in _UNSAFE:
        raise ValueError(
            f"the engine runs {target}, which cannot be saved: a file names operators of PyTorch and rarefy alone. "
            "Save the model and compile it where it is used"
        )
    function = reference.resolve(target)
    if namespace != "python" and function._schema.is_mutable:  # type: ignore[attr-defined]
        raise ValueError(f"the engine runs {target}, which changes its arguments: that cannot be saved")


class _Reader:
    """Makes an engine of a header and the blobs behind it; raises whatever comes of a header that is not right."""

    def __init__(self, blobs: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.blobs = blobs

    def engine(self, header: Mapping[str, _Json]) -> Engine:
        """The engine."""
        items = [self._item(about) for about in header["items"]]
        inputs, outputs = ([self._engine_port(about) for about in header[name]] for name in ("inputs", "outputs"))
        constants = {str(name): self._tensor(about) for name, about in header["constants"].items()}
        known = {*constants, *(port.name for port in inputs)}
        for item in items:
            reads, makes = uses(item)
            if not known.issuperset(reads):
                raise ValueError(f"a step reads {sorted({*reads} - known)}, which nothing makes")
            known.update(makes)
        if not outputs or not known.issuperset(port.name for port in outputs):
            raise ValueError("nothing makes an output")
        return Engine(
            items=items,
            inputs=inputs,
            outputs=outputs,
            single=bool(header["single"]),
            batch=header["batch"],
            fixed_because=header["fixed_because"],
            constants=constants,
            names=dict(header["names"]),
            layers={name: LayerFacts(**facts) for name, facts in header["layers"].items()},
            reasons=dict(header["reasons"]),
            threads=header["threads"],
            report=Report(**header["report"]),
        )

    def _engine_port(self, about: _Json) -> Port:
        return Port(about["name"], tuple(map(int, about["shape"])), _DTYPES[about["dtype"]])

    def _blob(self, place: _Json) -> np.ndarray[Any, np.dtype[np.uint8]]:
        offset, size = map(int, place)
        if offset < 0 or size < 0 or offset % _ALIGNMENT or offset + size > len(self.blobs):
            raise ValueError(f"nothing lies at {offset}")
        return self.blobs[offset : offset + size]

    def _tensor(self, about: _Json) -> Tensor:
        dtype, shape = _DTYPES[about["dtype"]], tuple(map(int, about["shape"]))
        if any(size < 0 for size in shape) or len(about["place"]) != 2:
            raise ValueError(f"a tensor has the shape {shape}")
        numbers = self._blob(about["place"])
        if math.prod(shape) * dtype.itemsize != len(numbers):
            raise ValueError(f"a tensor of the shape {shape} has {len(numbers)} bytes")
        tensor = torch.from_numpy(numbers).view(dtype).reshape(shape)
        return tensor.contiguous(memory_format=torch.channels_last) if about["last"] else tensor

    def _item(self, about: _Json) -> Item:
        if "program" in about:
            program = native.load(self._blob(about["program"]))
            ports = []
            for name, given in (("inputs", program.ports(outputs=False)), ("outputs", program.ports(outputs=True))):
                told = tuple(ProgramPort(port["value"], tuple(map(int, port["shape"]))) for port in about[name])
                if [math.prod(port.shape) for port in told] != [math.prod(shape) for shape, _ in given]:
                    raise ValueError(f"a program has other {name}")
                ports.append(told)
            return Segment(program, ports[0], ports[1], tuple(about["steps"]), float(about["rows"]))
        kind = _STEPS[about["step"]]
        given_fields = {name: self._value(value) for name, value in about["fields"].items()}
        if kind is Operator:
            _check_target(given_fields["target"])
        step = kind(**given_fields)
        if "packed" not in about:
            return step
        if not isinstance(step, Conv):
            raise ValueError(f"a {about['step']} is not packed")
        return packed(step, tuple(map(int, about["packed"]))) or step

    def _value(self, value: _Json) -> Any:
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
            case "tensor":
                return self._tensor(given)
            case "dtype":
                return _DTYPES[given]
            case "memory_format":
                return _MEMORY_FORMATS[given]
            case "layout":
                return torch.strided
            case "device":
                return torch.device("cpu")
            case "mapping":
                return {name: self._value(each) for name, each in given.items()}
            case "tuple":
                return tuple(self._value(each) for each in given)
        raise ValueError(f"there is no argument of the kind {kind!r}")
