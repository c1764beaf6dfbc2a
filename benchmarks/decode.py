"""A block of a language model at small batches, its weights read from memory; results/decode.csv.

    python benchmarks/decode.py [--rounds 15]
    python benchmarks/decode.py --print

The block is Llama's with 4096 channels, 11008 between, without its norms: seven linear layers, 202 million weights,
in all far more than any cache holds; ``zeros`` are those of smallest size in each layer, of random weights. Attention
over a cache is left out: its query and key are results, its value goes on, as for a first token. PyTorch runs the dense
block, in bfloat16 and in dynamic int8, ours are int8 throughout. All run in turn, one call each a round: ``ms`` is the
median of the time of a call, CPU time on one thread and wall time on two; ``against_int8`` and ``against_bfloat16`` are
medians over the rounds of the time of the engine's dense int8 and of PyTorch's bfloat16 through it, in the same round.
``gb_s`` is the weights' bytes by the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import results
from rarefy.engine.binding import CHANNELS_FIRST
from rarefy.engine.builder import Builder, Result
from rarefy.engine.programs import Int8Program

HIDDEN, BETWEEN = 4096, 11008
ZEROS = (0.0, 0.5, 0.7, 0.9)
#: What of ours runs at a batch size.
BATCHES = {1: ZEROS, 4: ZEROS[1:]}
OURS, TORCH = "rarefy", "PyTorch"
Name = tuple[str, str, float]  # the runtime, the precision, the share of zeros
Way = tuple[Callable[[Tensor], Any], float, str]
DENSE = (OURS, "int8", 0.0)
BFLOAT16 = (TORCH, "bfloat16", 0.0)


class Block(nn.Module):
    """PyTorch's dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(HIDDEN, BETWEEN, bias=False) for _ in range(2))
        self.down = nn.Linear(BETWEEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next block's (batch, hidden), and this one's query and key."""
        h = x + self.o(self.v(x))
        return h + self.down(F.silu(self.gate(h)) * self.up(h)), self.q(x), self.k(x)


def program(zeros: float, batch: int) -> Int8Program:
    """The same block in the engine's int8, of random weights: all of them, or taken as the engine does by rule."""
    chance = torch.Generator().manual_seed(0)
    builder, made = Builder(), [Result(zero_point=128, multiplier=32.0, bias=128.0)]

    def layer(x: int, outputs: int, inputs: int, name: str, residual: int = -1) -> int:
        weight = torch.empty(outputs, inputs).normal_(generator=chance)
        least = weight.flatten()[::101].abs().sort().values
        weight[weight.abs() < least[int(zeros * len(least))]] = 0.0
        weight = weight.mul_(127 / weight.abs().amax(1, keepdim=True)).round_()
        factors = 0.5 / weight.norm(dim=1)  # so that results are bytes as spread as what they are made of
        biases = torch.full((outputs,), 128.0 if residual < 0 else 128.0 - 0.5 * 128)
        made.append(
            Result(
                zero_point=128,
                multipliers=factors,
                biases=biases,
                other=0.0 if residual < 0 else 0.5,
                layout=None if zeros else "dense",
            )
        )
        return builder.conv(
            x, weight[:, :, None, None], None, residual=residual, storage="float32", choice="measure", name=name
        )

    x = builder.input((HIDDEN, 1, 1), CHANNELS_FIRST, "x")
    q, k, v = (layer(x, HIDDEN, HIDDEN, name) for name in "qkv")
    h = layer(v, HIDDEN, HIDDEN, "o", residual=x)
    gate, up = (layer(h, BETWEEN, HIDDEN, name) for name in ("gate", "up"))
    silu = F.silu((torch.arange(256) - 128) / 32).mul(32).add(128).round().clamp(0, 255).to(torch.uint8)
    made.append(Result(zero_point=128, table=silu))
    gated = builder.affine(gate, None, None, "none", name="silu")
    made.append(Result(zero_point=128, multiplier=1 / 32, bias=128.0))
    both = builder.binary(gated, up, multiply=True, activation="none", name="product")
    y = layer(both, HIDDEN, BETWEEN, "down", residual=h)
    for each in (y, q, k):
        builder.output(each, CHANNELS_FIRST)
        made.append(Result(multiplier=1 / 32))
    return builder.finish_int8(made, batch=batch, threads=1)


def ours(zeros: float, batch: int) -> Way:
    """How to run it, the bytes of its weights, and the kernel of its layers."""
    block = program(zeros, batch)
    y = [torch.empty(batch, HIDDEN) for _ in range(3)]
    (kernel,) = {step.kernel for step in block.steps() if step.weights}
    return lambda x: block.run([x], y, batch, torch.get_num_threads()), float(block.facts.weight_bytes), kernel


def peers() -> dict[Name, Way]:
    """PyTorch's ways."""
    block = Block().eval()
    count = float(sum(p.numel() for p in block.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to go to another package
        quantized = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            block, {nn.Linear}, dtype=torch.qint8
        )
    half = block.to(torch.bfloat16)
    return {
        BFLOAT16: (lambda x: half(x.to(torch.bfloat16)), 2 * count, "oneDNN"),
        (TORCH, "int8", 0.0): (quantized, count, "dynamic"),
    }


def measure(batch: int, threads: int, rounds: int, ways: Mapping[Name, Way]) -> list[dict[str, Any]]:
    """Rows of what ran in turn."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    x, load = torch.randn(batch, HIDDEN), os.getloadavg()[0]
    times: dict[Name, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for done in range(rounds + 2):
            for way, (run, *_) in ways.items():
                begun = clock()
                run(x)
                if done >= 2:
                    times[way].append((clock() - begun) * 1e3)
    load = (load + os.getloadavg()[0]) / 2

    def against(other: Name, way: Name) -> float | str:
        if other not in times:
            return ""
        return round(statistics.median(a / b for a, b in zip(times[other], times[way], strict=True)), 3)

    return [
        {
            "batch": batch, "threads": threads, "runtime": way[0], "precision": way[1], "zeros": way[2],
            "kernel": ways[way][2],
            "ms": round(statistics.median(each), 3), "min_ms": round(min(each), 3),
            "against_int8": against(DENSE, way), "against_bfloat16": against(BFLOAT16, way),
            "weight_mb": round(ways[way][1] / 1e6, 1),
            "gb_s": round(ways[way][1] / 1e6 / statistics.median(each), 1),
            "rounds": rounds, "load": round(load, 1),
            **{key: value for key, value in results.provenance().items() if key != "threads"},
        }
        for way, each in times.items()
    ]  # fmt: skip


def tables(rows: Sequence[Mapping[str, str]]) -> str:
    """The stored results."""
    lines = []
    for row in rows:
        name = f"{row['runtime']}, {row['precision']}" + (f", {float(row['zeros']):.0%} zeros" if float(row["zeros"])
                                                          else ", dense")  # fmt: skip
        ratios = (f"{float(row[key]):.2f}" if row[key] else "" for key in ("against_int8", "against_bfloat16"))
        lines.append(
            [
                results.processor(row),
                row["batch"],
                row["threads"],
                name,
                row["ms"],
                *ratios,
                row["weight_mb"],
                row["gb_s"],
            ]
        )
    head = [
        "processor",
        "batch",
        "threads",
        "",
        "ms",
        "times as fast as dense int8",
        "as PyTorch's bfloat16",
        "MB of weights",
        "GB/s",
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--print", action="store_true", help="print the table of the stored results, measure nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print(tables(results.read("decode")))
        return
    here = results.processor(results.provenance())
    kept = [row for row in results.read("decode") if results.processor(row) != here]
    rows: list[dict[str, Any]] = []
    others = peers()
    for batch, every in BATCHES.items():
        ways = {(OURS, "int8", zeros): ours(zeros, batch) for zeros in every}
        for threads in (1, 2) if batch == 1 else (1,):
            rows += measure(batch, threads, arguments.rounds, {**ways, **others})
        results.write("decode", [*kept, *rows])
    print(tables(results.read("decode")))


if __name__ == "__main__":
    main()
