"""The figures of the activation functions: ``python benchmarks/act.py`` writes results/act.csv.

``python benchmarks/act.py --csv results/act_avx2.csv`` does so on a machine without AVX-512, ``python benchmarks/act.py
--print`` prints the tables and figures of docs/results/activations.md from the files. ``--threads`` measures mode
"exact" of 64 MiB by one thread and by two, and a copy, by the clock on the wall, and writes results/act-threads.csv.
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from rarefy import act
from rarefy._files import write_csv
from rarefy.act.spec import formats, oracle, reference
from rarefy.cli import main
from rarefy.environment import provenance

RESULTS = Path(__file__).parents[1] / "results" / "act.csv"
AVX2 = RESULTS.with_name("act_avx2.csv")
THREADS = RESULTS.with_name("act-threads.csv")
B, F = "bfloat16", "float32"
NAMES = {"tanh": "tanh", "sigmoid": "sigmoid", "silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU by tanh"}
LABELS = {"exact": "exact", "ktanh": "K-TanH", "hard": "HardTanh"}

Times = dict[tuple[str, str, str], float]


def read(path: Path = RESULTS) -> Times:
    """Median nanoseconds an element (a call, for size "call8") by size, dtype and entry."""
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["size"], row["dtype"], row["entry"]): float(row["ns"]) for row in csv.DictReader(file)}


def figure(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:#.3g}".rstrip(".")


def largest_error(function: str, mode: str) -> float:
    """Over all bfloat16 inputs with |x| <= 16."""
    bits = formats.BF16.all_bits()
    bits = bits[np.abs(formats.BF16.decode(bits)) <= 16]
    y = formats.BF16.decode(reference.answers(function, mode, formats.BF16)[bits])
    return float(np.abs(y - oracle.evaluate(function, formats.BF16.decode(bits))).max())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bfloat16(ns: Times) -> str:
    """Every 16-bit function beside PyTorch's, in cache and in memory."""
    rows = [["memcpy", "", figure(ns["L2", B, "memcpy"]), figure(ns["DRAM", B, "memcpy"]), "", "", ""]]
    for mode, function in [("hard", "tanh"), ("ktanh", "tanh"), *(("exact", f) for f in oracle.TABLED)]:
        name = "HardTanh" if mode == "hard" else "K-TanH" if mode == "ktanh" else f"{NAMES[function]}, exact"
        theirs = "torch.hardtanh" if mode == "hard" else f"torch.{function}"
        ours = [ns[size, B, f"kernel {function} {mode}"] for size in ("L2", "DRAM")]
        peers = [ns[size, B, theirs] for size in ("L2", "DRAM")]
        ratios = [f"{peer / our:.1f}" for peer, our in zip(peers, ours, strict=True)]
        rows += [[name, f"{largest_error(function, mode):.5f}", *map(figure, ours), figure(peers[0]), *ratios]]
    return table(["bfloat16", "largest error", "ns, L2", "ns, DRAM", "PyTorch's, L2", "ratio, L2", "ratio, DRAM"], rows)


def float32(ns: Times) -> str:
    """The float32 functions that run on tables beside PyTorch's and SLEEF's."""
    rows = [["memcpy", *(figure(ns[size, F, "memcpy"]) for size in ("L2", "DRAM")), "", ""]]
    for name, entry in {"K-TanH": "kernel tanh ktanh", "tanh, exact": "kernel tanh exact"}.items():
        theirs, ours = ns["L2", F, f"torch.{entry.split()[1]}"], [ns[size, F, entry] for size in ("L2", "DRAM")]
        rows += [[name, *map(figure, ours), figure(theirs), f"{theirs / ours[0]:.2f}"]]
    for name, entry in {"tanh, SLEEF u35": "peer sleef_u35", "tanh, SLEEF u10": "peer sleef_u10"}.items():
        rows += [[name, *(figure(ns[size, F, entry]) for size in ("L2", "DRAM")), "", ""]]
    return table(["float32", "ns, L2", "ns, DRAM", "PyTorch's, L2", "ratio, L2"], rows)


def without_avx512(ns: Times, dtype: str) -> str:
    """What AVX2 gives of a format: modes "exact" and, in float32, "fast" beside PyTorch's functions."""
    rows = [["memcpy", "", *(figure(ns[size, dtype, "memcpy"]) for size in ("L2", "DRAM")), *[""] * 4]]
    for mode in ("exact", "fast") if dtype == F else ("exact",):
        for function in oracle.TABLED:
            bound = f"{reference.MAX_ULP[mode][function]:g} ulp" if dtype == F else "0.5 ulp"
            ours = [ns[size, dtype, f"kernel {function} {mode}"] for size in ("L2", "DRAM")]
            peers = [ns[size, dtype, f"torch.{function}"] for size in ("L2", "DRAM")]
            ratios = [f"{peer / our:.2f}" for peer, our in zip(peers, ours, strict=True)]
            rows += [[f"{NAMES[function]}, {mode}", bound, *map(figure, ours), *map(figure, peers), *ratios]]
    head = [
        f"{dtype}, AVX2",
        "bound",
        "ns, L2",
        "ns, DRAM",
        "PyTorch's, L2",
        "PyTorch's, DRAM",
        "ratio, L2",
        "ratio, DRAM",
    ]
    return table(head, rows)


def slower() -> str:
    """Every function, mode and format of both files that takes longer than PyTorch's: PyTorch's time over ours."""
    sizes = ("L1", "L2", "DRAM")
    rows = []
    for name, ns in (("AVX-512", read()), ("AVX2", read(AVX2))):
        for dtype, entry in dict.fromkeys((dtype, entry) for _, dtype, entry in ns):
            way, *which = entry.split()
            if way not in ("kernel", "call") or len(which) != 2:
                continue
            theirs = "torch.hardtanh" if which == ["tanh", "hard"] else f"torch.{which[0]}"
            pairs = [(ns.get((size, dtype, theirs), 0.0), ns.get((size, dtype, entry), 0.0)) for size in sizes]
            cells = [f"{peer / our:.3f}" if 0 < peer < our else "" for peer, our in pairs]
            if any(cells):
                rows += [[name, dtype, NAMES[which[0]], which[1], way, *cells]]
    return table(["slower", "format", "function", "mode", "timed", *sizes], rows)


def measure_threads(rounds: int = 41) -> None:
    """Time 64 MiB by one thread and by two, all in turn, and write medians and least times."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn((1 << 26) // dtype.itemsize).to(dtype)
        y = torch.empty_like(x)
        calls: dict[str, Callable[[], object]] = {"copy": functools.partial(y.copy_, x)}
        calls |= {name: functools.partial(getattr(act, name), x, out=y) for name in ("tanh", "sigmoid", "silu", "gelu")}
        calls["gelu_tanh"] = functools.partial(act.gelu, x, approximate="tanh", out=y)
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for (name, call), threads in itertools.product(calls.items(), (1, 2)):
                torch.set_num_threads(threads)
                begin = time.perf_counter()
                call()
                seconds.setdefault((name, threads), []).append(time.perf_counter() - begin)
        for name in calls:
            row: dict[str, object] = {"function": name, "dtype": str(dtype).removeprefix("torch.")}
            for threads, column in ((1, "one"), (2, "two")):
                taken = [each * 1e9 / x.numel() for each in seconds[name, threads]]
                row |= {f"{column}_ns": round(statistics.median(taken), 4), f"{column}_least_ns": round(min(taken), 4)}
            rows.append(
                {**row, "load": round(os.getloadavg()[0], 1), **provenance("python benchmarks/act.py --threads")}
            )
    write_csv(THREADS, rows)


def two_threads() -> str:
    """How many times as fast two threads are as one."""
    with THREADS.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = []
    for row in found:
        times = [float(row[f"{threads}_{which}ns"]) for which in ("", "least_") for threads in ("one", "two")]
        ratios = [f"{times[0] / times[1]:.2f}", f"{times[2] / times[3]:.2f}"]
        rows.append([row["dtype"], NAMES.get(row["function"], row["function"]), *map(figure, times[:2]), *ratios])
    return table(["64 MiB", "function", "ns, one thread", "ns, two", "times as fast", "by least times"], rows)


def sentences(ns: Times) -> dict[str, str]:
    """What the docs say in words, by a name."""

    def ratio(over: str, under: str, size: str = "L2", dtype: str = B) -> float:
        return ns[size, dtype, over] / ns[size, dtype, under]

    memory = {f: ratio(f"kernel {f} exact", "memcpy", "DRAM") for f in oracle.TABLED}
    extra = 100 * (ratio("kernel tanh exact", "kernel tanh ktanh") - 1)
    return {
        "memory": f"tanh {memory['tanh']:.1f} times, sigmoid, SiLU and GELU by tanh"
        f" {min(memory[f] for f in ('sigmoid', 'silu', 'gelu_tanh')):.1f} to"
        f" {max(memory[f] for f in ('sigmoid', 'silu', 'gelu_tanh')):.1f}, GELU {memory['gelu']:.1f}",
        "hard": f"{ratio('kernel tanh ktanh', 'kernel tanh hard'):.1f} times faster than K-TanH",
        "torch hard": f"{ratio('torch.hardtanh', 'kernel tanh ktanh'):.1f} times faster than PyTorch's own HardTanh",
        "exact": f"{extra:.0f} % more than K-TanH",
        "gelu": f"{ratio('torch.gelu', 'kernel gelu exact'):.1f} times faster in cache and"
        f" {ratio('torch.gelu', 'kernel gelu exact', 'DRAM'):.1f} times in memory",
        "call": f"{ns['call8', B, 'act.tanh'] / 1000:.1f} us on 8 elements,"
        f" {ns['call8', B, 'act.tanh'] / ns['call8', B, 'torch.tanh']:.1f} times that of `torch.tanh`",
        "avx2": f"{figure(ns['L2', B, 'kernel tanh exact avx2'])} ns"
        f" ({ratio('torch.tanh', 'kernel tanh exact avx2'):.1f} times faster than `torch.tanh`)",
        "portable": f"plain C looks answers up in {figure(ns['L2', B, 'kernel tanh exact portable'])} ns",
        "inductor": f"{figure(ns['L2', B, 'inductor tanh exact'])} ns for exact tanh, where compiled `torch.tanh` takes"
        f" {figure(ns['L2', B, 'inductor torch.tanh'])}",
        "onednn": f"{figure(ns['L2', B, 'onednn tanh'])} ns in bfloat16,"
        f" {ratio('onednn tanh', 'kernel tanh exact'):.0f} times ours",
        "sleef": f"{ratio('peer sleef_u35', 'kernel tanh exact', dtype=F):.1f} times faster than SLEEF's u35",
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["--threads"]:
        measure_threads()
        sys.exit(0)
    if sys.argv[1:] == ["--print"]:
        times = read()
        tables = [without_avx512(read(AVX2), dtype) for dtype in (F, B, "float16")]
        print(bfloat16(times), float32(times), *tables, slower(), two_threads(), *sentences(times).values(), sep="\n\n")
        sys.exit(0)
    sys.exit(main(["bench", "act", "--csv", str(RESULTS), *sys.argv[1:]]))
