"""A block of a language model at small batches, its weights read from memory; results/decode.csv.

    python benchmarks/decode.py [--rounds 15]
    python benchmarks/decode.py --print

The block is Llama's with 4096 channels, 11008 between, without its norms: seven linear layers, 202 million weights,
in all far more than any cache holds. ``zeros`` are those of smallest
size in each layer. Attention over a cache is left out: its query and key are results, its value goes on, as for a first
token. All run in turn, one call each a round: ``ms`` is the median of the time of a call, CPU time on one thread and
wall time on two; ``against_int8`` and ``against_bfloat16`` are medians over the rounds of the time of the engine's
dense int8 and of PyTorch's bfloat16 through it, in the same round. ``gb_s`` is the weights' bytes by the time.
"""

from __future__ import annotations

import argparse
import gc
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
from rarefy import engine
from rarefy.engine import Engine

HIDDEN, BETWEEN = 4096, 11008
ZEROS = (0.0, 0.5, 0.7, 0.9)
#: What runs at a batch size; the dense layout of the engine's for several vectors is made for caches, not for this.
BATCHES = {1: ZEROS, 4: ZEROS[1:]}
OURS, TORCH = "rarefy", "PyTorch"
DENSE = (OURS, "int8", 0.0)
BFLOAT16 = (TORCH, "bfloat16", 0.0)


class Block(nn.Module):
    """The layers of a block; ``zeros`` is the share of the weights of each that are zero."""

    def __init__(self, zeros: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (self._layer(HIDDEN, HIDDEN, zeros) for _ in range(4))
        self.gate, self.up = (self._layer(BETWEEN, HIDDEN, zeros) for _ in range(2))
        self.down = self._layer(HIDDEN, BETWEEN, zeros)

    @staticmethod
    def _layer(outputs: int, inputs: int, zeros: float) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            size = layer.weight.normal_(0, inputs**-0.5).abs()
            least = size.flatten()[::101].sort().values
            layer.weight[size < least[int(zeros * len(least))]] = 0.0
        return layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next block's (batch, hidden), and this one's query and key."""
        h = x + self.o(self.v(x))
        return h + self.down(F.silu(self.gate(h)) * self.up(h)), self.q(x), self.k(x)


def compiled(zeros: float, batch: int) -> tuple[Engine, float]:
    """The engine of a block in int8, its kernels by rule, and the bytes of its weights."""
    torch.manual_seed(0)
    made = engine.compile(
        Block(zeros).eval(), torch.randn(batch, HIDDEN), precision="int8", calibration=[torch.randn(16, HIDDEN)],
        error_budget=1.0, choose="native",
    )  # fmt: skip
    gc.collect()
    return made, float(made.report.weight_bytes)


def peers() -> dict[tuple[str, str, float], tuple[Callable[[Tensor], Any], float]]:
    """PyTorch's ways to run the dense block, and the bytes of their weights."""
    torch.manual_seed(0)
    block = Block(0.0).eval()
    count = float(sum(p.numel() for p in block.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to go to another package
        quantized = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            block, {nn.Linear}, dtype=torch.qint8
        )
    half = block.to(torch.bfloat16)
    return {
        BFLOAT16: (lambda x: half(x.to(torch.bfloat16)), 2 * count),
        (TORCH, "int8", 0.0): (quantized, count),
    }


def measure(batch: int, threads: int, rounds: int, ways: Mapping[Any, tuple[Callable[[Tensor], Any], float]]) -> Any:
    """Rows of what ran in turn."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    x, load = torch.randn(batch, HIDDEN), os.getloadavg()[0]
    times: dict[Any, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for done in range(rounds + 2):
            for way, (run, _) in ways.items():
                begun = clock()
                run(x)
                if done >= 2:
                    times[way].append((clock() - begun) * 1e3)
    load = (load + os.getloadavg()[0]) / 2

    def against(other: Any, way: Any) -> float | str:
        if other not in times:
            return ""
        return round(statistics.median(a / b for a, b in zip(times[other], times[way], strict=True)), 3)

    return [
        {
            "batch": batch, "threads": threads, "runtime": way[0], "precision": way[1], "zeros": way[2],
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
        lines.append([row["batch"], row["threads"], name, row["ms"], *ratios, row["weight_mb"], row["gb_s"]])
    head = [
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
    rows: list[dict[str, Any]] = []
    others = peers()
    for batch, every in BATCHES.items():
        ways: dict[Any, tuple[Callable[[Tensor], Any], float]] = {}
        for zeros in every:
            ways[OURS, "int8", zeros] = compiled(zeros, batch)
            print(f"batch {batch}: compiled with {zeros:.0%} zeros", flush=True)
        for threads in (1, 2) if batch == 1 else (1,):
            rows += measure(batch, threads, arguments.rounds, {**ways, **others})
        results.write("decode", rows)
    print(tables(results.read("decode")))


if __name__ == "__main__":
    main()
