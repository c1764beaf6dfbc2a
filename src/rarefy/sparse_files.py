"""Sparse weights in a safetensors file: the nonzero values, and one bit a weight for where they stand.

The layout, version 1. A file is an ordinary safetensors file; its header's metadata holds, all as text,

- ``format``: "rarefy-sparse"; ``format_version``: "1";
- ``shapes``: JSON, the shape of every tensor NAME that is stored sparsely, which is as two tensors of one dimension:
  ``NAME.values``, of the tensor's dtype, the weights that are not zero, in order of their flat (C order) index, and
  ``NAME.bitmask``, uint8, bit ``i % 8`` (the lowest is bit 0) of byte ``i // 8`` set where weight i is in the values;
  the bits after the last weight are 0;
- ``tied``: JSON, for every name that is another name of the same tensor, the one it is stored under;
- ``sha256``: the digest of all of it (:func:`digest`).

A tensor that would not be smaller is stored as it is, under its own name. "Zero" means that all bits are 0: -0.0 and
NaN are values, so every bit comes back. (``weight * mask`` makes a -0.0 of every negative weight that it prunes, which
is stored as a value: ``weight * mask + 0.0`` has none. ``finalize()`` leaves none.)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rarefy._files import write_atomically

FORMAT, VERSION = "rarefy-sparse", "1"

#: Bytes that a second tensor takes in the header, about: less is not worth being stored sparsely for.
_ENTRY = 128

_DTYPES = {
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a model's weights, about ``nonzeros * bits + 1`` bit a weight; the file is replaced whole or not at all.

    Args:
        model: a finalized model (see :meth:`rarefy.Sparsifier.finalize`), or a state dict: dense tensors of any shape,
            on any device, of a dtype that safetensors has. Tensors that are one (tied weights) are stored once.
        path: the file, by custom NAME.safetensors.

    Raises:
        ValueError: something in the state dict is no such tensor.
        OSError: the file cannot be written.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    for name, tensor in state.items():
        _check(name, tensor)
    tied = _tied(state)
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if name in tied:
            continue
        parts = _split(tensor)
        if parts is None or {f"{name}.values", f"{name}.bitmask"} & state.keys():
            stored[name] = _plain(tensor).clone()  # a file holds no views
        else:
            stored[f"{name}.values"], stored[f"{name}.bitmask"] = parts
            shapes[name] = list(tensor.shape)
    about = {
        "format": FORMAT,
        "format_version": VERSION,
        "shapes": json.dumps(shapes, sort_keys=True),
        "tied": json.dumps(tied, sort_keys=True),
    }
    about["sha256"] = digest(stored, about)
    data = save(stored, metadata=about)
    write_atomically(Path(path), lambda partial: partial.write_bytes(data))


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict that :func:`save_sparse` wrote, dense and on the CPU, bit for bit; tied tensors are one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, altered, of a later version of rarefy, or no sparse file.
    """
    stored, about = _read(Path(path))
    shapes, tied = _table(path, about, "shapes"), _table(path, about, "tied")
    if digest(stored, about) != about.get("sha256"):
        raise _damaged(path, "its checksum is another")
    state = dict(stored)
    for name, shape in shapes.items():
        values, bitmask = state.pop(f"{name}.values", None), state.pop(f"{name}.bitmask", None)
        if values is None or bitmask is None or name in state:
            raise _damaged(path, f"{name} must be stored as {name}.values and {name}.bitmask")
        state[name] = _joined(path, name, shape, values, bitmask)
    for name, other in tied.items():
        if name in state or not isinstance(other, str) or other not in state:
            raise _damaged(path, f"{name} is tied to {other!r}, which is not stored")
        state[name] = state[other]
    return state


def is_sparse_file(path: str | Path) -> bool:
    """Say whether :func:`load_sparse` reads the file, by its header; False for any other safetensors file.

    Raises as :func:`load_sparse` for a file that is missing, or no safetensors file.
    """
    return _header(Path(path)).get("format") == FORMAT


def digest(stored: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 in hexadecimal: of ``shapes``, of ``tied``, then by the order of their names of every stored tensor's
    name, dtype (as ``str(dtype)``), shape (as a JSON list) and bytes; after each text a zero byte.
    """
    sha = hashlib.sha256()
    for text in (about["shapes"], about["tied"]):
        sha.update(text.encode() + b"\0")
    for name, tensor in sorted(stored.items()):
        for text in (name, str(tensor.dtype), json.dumps(list(tensor.shape))):
            sha.update(text.encode() + b"\0")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a file holds tensors only, but {name!r} is of type {type(tensor).__name__}: leave it out")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in _DTYPES:
        kind = "on the meta device" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise ValueError(f"{name!r} is {kind}; a file holds dense tensors of the dtypes of safetensors: convert it")


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name of a tensor but the first, to the first."""
    first: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, t in state.items():
        if t.numel():
            same = first.setdefault((t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj()), name)
            if same != name:
                tied[name] = same
    return tied


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _split(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values and bitmask, or None where the tensor itself is not larger."""
    flat = _plain(tensor).reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    mask = bits != 0
    nonzeros = int(mask.sum())
    if nonzeros * flat.element_size() + -(-flat.numel() // 8) + _ENTRY >= flat.nbytes:
        return None
    packed = np.packbits(mask.numpy(), bitorder="little")
    return bits[mask].view(flat.dtype), torch.from_numpy(packed)


def _joined(path: str | Path, name: str, shape: Any, values: Tensor, bitmask: Tensor) -> Tensor:
    """The dense tensor, from its shape, its values and their places."""
    sizes = shape if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) else [2**63]
    if math.prod(max(size, 1) for size in sizes) >= 2**63:
        raise _damaged(path, f"the shape of {name} is {shape!r:.80}")
    count = math.prod(sizes)
    if values.dim() != 1 or bitmask.dtype != torch.uint8 or bitmask.shape != (-(-count // 8),):
        wanted = f"values of one dimension and {-(-count // 8)} bytes of bitmask for its {count} weights"
        raise _damaged(path, f"{name} must have {wanted}, got {tuple(values.shape)} and {tuple(bitmask.shape)}")
    bits = np.unpackbits(bitmask.numpy(), bitorder="little")
    mask = torch.from_numpy(bits[:count]).bool()
    if bits.sum() != len(values) or bits[count:].any():
        raise _damaged(path, f"the bitmask of {name} marks {bits.sum()} of {count} weights, {len(values)} are there")
    kind = _BITS[values.element_size()]
    dense = torch.zeros(count, dtype=kind)
    dense[mask] = values.view(kind)
    return dense.view(values.dtype).reshape(shape)


def _header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored, and the metadata of a file that this version reads."""
    about = _header(path)
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but no sparse one of rarefy; safetensors.torch.load_file reads it"
        )
    if about.get("format_version") != VERSION:
        given = about.get("format_version")
        raise ValueError(f"{path} has format_version {given!r}, this rarefy reads {VERSION!r}: update rarefy")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _table(path: str | Path, about: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        table = json.loads(about[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header has no {key!r} in JSON") from error
    if not isinstance(table, dict):
        raise _damaged(path, f"{key!r} in its header is {table!r:.80}")
    return table


def _damaged(path: str | Path, why: str) -> ValueError:
    return ValueError(f"{path} is cut off, altered or not a safetensors file ({why}): write or fetch it again")
