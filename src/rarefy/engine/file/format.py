"""What the writer and the reader of an engine's file agree on: its head, its checksum, and how values are named."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rarefy.engine.dry_run import LARGEST_INTEGER, dry_run
from rarefy.engine.engine import Engine
from rarefy.engine.int8 import Int8
from rarefy.engine.plan import Quantized

VERSION = 3

MAGIC = b"rarefy\x00e"
#: Magic, version, nothing, size of the file, size of the header, SHA-256.
HEAD = struct.Struct("<8sIIQQ32s")
#: Of what follows the head, in bytes.
ALIGNMENT = 64
#: Bytes of a native program that the file's checksum is of.
PROGRAM_HEAD = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.complex64, torch.complex128),
    )
}
MEMORY_FORMATS = {
    str(each).removeprefix("torch."): each
    for each in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
#: What JSON can hold; nothing more is known of it where it is read.
Json: TypeAlias = Any


def checksum(text: bytes, blobs: bytes | memoryview, header: Mapping[str, Json]) -> bytes:
    """The SHA-256 of a header's text and the blobs behind it, of native programs their first 64 bytes alone."""
    found, at = hashlib.sha256(text), 0
    for offset, size in sorted(map(sizes, (item["program"] for item in header["items"] if "program" in item))):
        found.update(blobs[at : offset + PROGRAM_HEAD])
        at = max(at, offset + size)
    found.update(blobs[at:])
    return found.digest()


def check_runs(engine: Engine) -> None:
    """Raise ValueError for an engine that cannot run on inputs of the shapes that it was compiled for."""
    inputs = {port.name: torch.empty(port.shape, dtype=port.dtype, device="meta") for port in engine.inputs}
    values = dry_run(engine._items, inputs, engine._constants)
    for port in engine.outputs:
        value = values[port.name]
        if not isinstance(value, Tensor) or tuple(value.shape) != port.shape or value.dtype != port.dtype:
            raise ValueError(f"output {port.name!r} is not {port.shape} of {port.dtype}")


def meanings(item: Int8) -> tuple[Quantized | None, ...]:
    """What the bytes mean: of each operand, and of the result."""
    return (*item.operands, item.result)


def sizes(value: Json) -> tuple[int, ...]:
    """The whole numbers of a list that a file gives. Raises ValueError for anything else, and for negative ones."""
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size <= LARGEST_INTEGER for size in value):
        raise ValueError(f"sizes are {value!r:.80}")
    return tuple(value)
