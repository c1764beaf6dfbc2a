"""Files that somebody changed, with checksums that are right: they are read and used, or refused with ValueError.

More of them: python -m tests.test_hostile_files COUNT [FIRST]. Every mutant is known by its number alone.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import random
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import rarefy
from rarefy import act, engine
from rarefy.act.spec.table import Table
from rarefy.engine.arguments import Choose
from rarefy.engine.assembling import build
from rarefy.engine.capture import capture
from rarefy.engine.file import format
from rarefy.engine.passes import optimize
from rarefy.sparse_files import digest
from rarefy.train import recipe
from tests.engine.networks import thinned

pytestmark = pytest.mark.slow

COUNT = 1000
MEMORY = 16 << 30  # of addresses: a file of some kilobytes asks for no more
LARGEST_INPUT = 1 << 20
HEAD = struct.Struct("<8sIIQQ32s")
VALUES: list[Any] = [
    *(0, 1, -1, 3, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, 1e308, math.inf, math.nan),
    *("", "x", "\0", "\ud800", "weight", None, True, False, [], {}, [[]], [0], [-1], [2**63], {"x": 0}, {"ref": "x"}),
]
TABLES = ("tanh_bf16_ktanh", "tanh_bf16", "sigmoid_bf16_shifts")
Mutant = Callable[[random.Random, Path], Callable[[], None]]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every entry in JSON, as what holds it and its key."""
    own = list(node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(node, (dict, list)) else []
    return [(node, key) for key, _ in own] + [place for _, inner in own for place in places(inner)]


def changed(node: Any, picked: random.Random) -> Any:
    """A copy with one to three entries replaced, taken out, or exchanged for another entry."""
    node = copy.deepcopy(node)
    for _ in range(picked.choice((1, 1, 1, 2, 3))):
        found = places(node)
        if not found:
            break
        holder, key = picked.choice(found)
        how = picked.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == 2:
            other, name = picked.choice(found)
            if isinstance(other, list) and name >= len(other):
                continue
            holder[key] = copy.deepcopy(other[name])
        elif how < 6 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] + picked.choice((-1, 1))
        else:
            holder[key] = copy.deepcopy(picked.choice(VALUES))
    return node


def scribbled(data: bytes, picked: random.Random) -> bytes:
    """With one to three bytes or words of four bytes replaced."""
    altered = bytearray(data)
    for _ in range(picked.choice((1, 1, 2, 3))):
        place = picked.randrange(min(len(altered), 512) if picked.random() < 0.5 else len(altered))
        word = picked.choice(
            (b"\0", b"\xff", b"[", b"\xff" * 4, bytes(4), b"\0\0\0\x80", bytes([picked.randrange(256)]))
        )
        altered[place : place + len(word)] = word
    return bytes(altered[: len(data)])


def word_sum(data: bytes) -> int:
    """The native engine's checksum of bytes."""

    def mix(h: int, word: int) -> int:
        h = (h ^ word) * 0x9E3779B185EBCA87 % 2**64
        return h ^ h >> 29

    lanes = [1, 2, 3, 4]
    whole = len(data) // 32 * 32
    for i, (word,) in enumerate(struct.iter_unpack("<Q", data[:whole])):
        lanes[i % 4] = mix(lanes[i % 4], word)
    for byte in data[whole:]:
        lanes[0] = mix(lanes[0], byte + 1)
    h = len(data)
    for lane in lanes:
        h = mix(h, lane)
    return h


def sealed(program: bytes) -> bytes:
    """A native program with the size and the checksum that its other bytes ask for."""
    head = program[:16] + struct.pack("<QQ", len(program), 0) + program[32:64]
    sums = struct.pack("<QQ", word_sum(head), word_sum(program[64:]))
    return head[:24] + struct.pack("<Q", word_sum(sums)) + program[32:]


def network() -> nn.Module:
    """A convolution, a linear layer, a softmax."""
    return thinned(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.Softmax(-1))
    ).eval()


class Recurrent(nn.Module):
    """An LSTM, and a cell that begins with zeros of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cell = nn.LSTM(5, 4, batch_first=True), nn.LSTMCell(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.layer(x)
        h, _ = self.cell(y[:, -1])
        return h


def engines(folder: Path) -> Mutant:
    """Mutants of the files of engines of native programs, and of one of operators of PyTorch."""
    images, steps = torch.randn(2, 2, 6, 6), torch.randn(2, 3, 5)
    makers = [_engine(folder, network(), images, choose) for choose in ("native", "torch")]
    makers.append(_engine(folder, Recurrent().eval(), steps, "native"))
    return lambda picked, path: picked.choice(makers)(picked, path)


def _engine(folder: Path, model: nn.Module, x: torch.Tensor, choose: Choose) -> Mutant:
    compiled = build(optimize(capture(model, (x,))), (x,), None, "float32", choose, 0.0)
    engine.save(compiled, folder / "whole.engine")
    data = (folder / "whole.engine").read_bytes()
    magic, version, zero, _, length, _ = HEAD.unpack(data[: HEAD.size])
    header, blobs = json.loads(data[HEAD.size : HEAD.size + length]), data[HEAD.size + length :]
    programs = [item["program"] for item in header["items"] if "program" in item]
    assert bool(programs) == (choose == "native")
    for offset, size in programs:
        assert sealed(blobs[offset : offset + size]) == blobs[offset : offset + size]

    def mutant(picked: random.Random, path: Path) -> Callable[[], None]:
        about, behind = header, blobs
        if not programs or picked.random() < 0.7:
            about = changed(header, picked)
        else:
            offset, size = picked.choice(programs)
            program = sealed(scribbled(blobs[offset : offset + size], picked))
            behind = blobs[:offset] + program + blobs[offset + size :]
        text = json.dumps(about).encode()
        text += b" " * (-len(text) % 64)
        try:
            right = format.checksum(text, behind, about)
        except Exception:  # a header that says nothing of where programs lie
            right = bytes(32)
        head = HEAD.pack(magic, version, zero, HEAD.size + len(text) + len(behind), len(text), right)
        path.write_bytes(head + text + behind)

        def use() -> None:
            loaded = engine.load(path)
            if sum(math.prod(port.shape) for port in loaded.inputs) <= LARGEST_INPUT:
                loaded(*loaded.example())

        return use

    return mutant


def sparse_files(folder: Path) -> Mutant:
    """Mutants of a file of sparse weights."""
    state = {"weight": network().state_dict()["3.weight"], "bias": torch.arange(5.0), "scale": torch.ones(())}
    rarefy.save_sparse({**state, "tied": state["weight"]}, folder / "whole.safetensors")
    data = (folder / "whole.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, blobs = json.loads(data[8 : 8 + length]), data[8 + length :]
    for key in ("shapes", "tied"):
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])

    def mutant(picked: random.Random, path: Path) -> Callable[[], None]:
        about, behind = (
            (changed(header, picked), blobs) if picked.random() < 0.7 else (header, scribbled(blobs, picked))
        )
        about = copy.deepcopy(about)
        inner = about.get("__metadata__")
        if isinstance(inner, dict):
            for key in {"shapes", "tied"} & inner.keys():
                inner[key] = json.dumps(inner[key])

        def write() -> None:
            text = json.dumps(about).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + behind)

        write()
        try:
            inner["sha256"] = digest(load_file(path), inner)
        except Exception:  # one that safetensors itself refuses, or that has no text to digest
            return lambda: use(path)
        write()
        return lambda: use(path)

    def use(path: Path) -> None:
        for tensor in rarefy.load_sparse(path).values():
            tensor.double().sum()

    return mutant


def tables(_: Path) -> Mutant:
    """Mutants of a table's JSON."""
    texts = [act.load(name).to_json() for name in TABLES]
    x = torch.arange(-128, 128).float() / 16

    def mutant(picked: random.Random, path: Path) -> Callable[[], None]:
        whole = picked.choice(texts)
        if picked.random() < 0.8:
            head = json.loads(whole)
            rows = head.pop("rows")
            text = json.dumps(
                {**changed(head, picked), "rows": changed(rows, picked) if picked.random() < 0.5 else rows}
            )
        else:
            text = scribbled(whole.encode(), picked).decode("latin-1")

        def use() -> None:
            table = Table.from_json(text)
            assert Table.from_json(table.to_json()) == table
            fmt = table.fmt
            table.compute(fmt.encode(x.double().numpy()))
            if fmt.name in ("bf16", "fp16") and table.function in ("tanh", "sigmoid"):
                given = x.to(torch.bfloat16 if fmt.name == "bf16" else torch.float16)
                getattr(act, table.function)(given, mode="ktanh", table=table)

        return use

    return mutant


def recipes(_: Path) -> Mutant:
    """Mutants of a recipe, and recipes that are small and say much."""
    whole = recipe.parse(
        {
            "name": "whole",
            "model": {"name": "resnet20", "width": 8},
            "method": {"name": "autosparse", "target": 0.9},
            "data": {"train_size": 100, "augment": "crop-flip"},
        }
    ).to_dict()
    more = "".join(f"  a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(12))
    bomb = f"model:\n  name: resnet20\n  a0: &a0 [x]\n{more}  width: *a12\n"
    odd = [
        bomb,
        bomb.replace("  name: resnet20\n", ""),
        "model: &m {name: *m}",
        "model: &m\n  name: resnet20\n  width: *m",
    ]

    def mutant(picked: random.Random, path: Path) -> Callable[[], None]:
        if picked.random() < 0.7:
            text = yaml.safe_dump(changed(whole, picked)).encode("utf-8", "surrogatepass")
        elif picked.random() < 0.9:
            text = scribbled(yaml.safe_dump(whole).encode(), picked)
        else:
            text = picked.choice(odd).encode()
        path.write_bytes(text)

        def use() -> None:
            loaded = recipe.load(path)
            assert recipe.parse(loaded.to_dict()) == loaded

        return use

    return mutant


def main(count: int, first: int) -> int:
    """Make and use so many mutants; the number of each is printed before it is used, what went wrong after it."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = [make(folder) for make in (engines, sparse_files, tables, recipes)]
        for number in range(first, first + count):
            kind = kinds[number % len(kinds)]
            about = ("engine", "sparse", "table", "recipe")[number % len(kinds)]
            use = kind(random.Random(number), folder / "mutant")
            print(number, about, flush=True)
            try:
                use()
                outcomes[f"{about} used"] += 1
            except (ValueError, OSError):
                outcomes[f"{about} refused"] += 1
            except BaseException:
                outcomes[f"{about} wrong"] += 1
                print(f"mutant {number}:\n{traceback.format_exc()}", flush=True)
    print(dict(sorted(outcomes.items())))
    return int(any("wrong" in outcome for outcome in outcomes))


def test_mutants_are_used_or_refused() -> None:
    command = [sys.executable, "-m", "tests.test_hostile_files", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"after mutant\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    outcomes = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert sum(outcomes.values()) == COUNT
    assert min(outcomes[f"{kind} used"] for kind in ("engine", "sparse", "table", "recipe")) >= 10


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
