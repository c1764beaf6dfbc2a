"""The figures of docs/results/activations.md, from results/act.csv: ``python benchmarks/act_figures.py``."""

import csv
import math
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from rarefy import act
from rarefy.act.spec import error, formats, oracle, reference

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rarefy"  # the same file each time

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("tanh", "sigmoid", "silu", "gelu")
COLOURS = {"exact": "C0", "ktanh": "C1", "monotone": "C2", "hard": "C3"}


def errors(path: Path) -> None:
    """Absolute error of every bf16 number in [-6, 6], by mode, for each function."""
    bits = np.concatenate([np.arange(0x40C0, 0x3800, -1) | 0x8000, np.arange(0x3800, 0x40C1)])
    x = formats.BF16.decode(bits)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    for axis, function in zip(axes.flat, FUNCTIONS, strict=True):
        true = oracle.evaluate(function, x)
        curves = {mode: reference.answers(function, mode, formats.BF16) for mode in ("hard", "ktanh")}
        if function == "tanh":
            curves["monotone"] = act.load("tanh_bf16_monotone").compute(np.arange(65536))
        curves["exact"] = reference.answers(function, "exact", formats.BF16)
        for mode, answers in curves.items():
            y = np.abs(formats.BF16.decode(answers[bits].astype(np.int64)) - true)
            axis.semilogy(x, np.maximum(y, 1e-6), lw=0.7, color=COLOURS[mode], label=mode, rasterized=True)
        axis.set_title(function)
        axis.set_ylim(1e-6, 1)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("x")
    figure.supylabel("absolute error, bf16")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, metadata={"Date": None})


def _max_error32(mode: str) -> float:
    x = np.linspace(-20, 20, 1_000_001).astype(np.float32)
    if mode == "hard":
        return 1 - math.tanh(1)
    if mode == "exact":
        from rarefy.act.spec import quartic

        y = quartic.tanh().compute(x.view(np.uint32))
    else:
        y = reference.compute("tanh", mode, formats.FP32, x.view(np.uint32))
    return float(np.abs(formats.FP32.decode(y) - np.tanh(x.astype(np.float64))).max())


def pareto(results: Path, path: Path) -> None:
    """Largest absolute error of tanh against time, arrays in L2."""
    with results.open(encoding="utf-8") as file:
        ns = {(r["dtype"], r["entry"]): float(r["ns"]) for r in csv.DictReader(file) if r["size"] == "L2"}
    small = {
        mode: error.measure("tanh", "bf16", reference.answers("tanh", mode, formats.BF16)).max_abs
        for mode in reference.MODES
    }
    points = {
        "bfloat16": {f"kernel tanh {mode}": small[mode] for mode in reference.MODES}
        | {"kernel tanh exact avx2": small["exact"], "kernel tanh exact portable": small["exact"]}
        | {"torch.tanh": small["exact"], "torch.hardtanh": small["hard"]},
        # errors in units of the last place as published for SLEEF and MKL, as absolute errors below 1
        "float32": {f"kernel tanh {mode}": _max_error32(mode) for mode in ("exact", "ktanh")}
        | {"peer hard32": small["hard"], "peer sleef_u35": 2.77 * 2**-24, "peer sleef_u10": 2.0**-24}
        | {"torch.tanh": 0.51 * 2**-24},
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, (dtype, entries) in zip(axes, points.items(), strict=True):
        for entry, value in entries.items():
            if (dtype, entry) not in ns:
                continue
            ours = entry.startswith("kernel")
            axis.loglog(ns[dtype, entry], value, "o" if ours else "s", color="C0" if ours else "C7")
            label = entry.removeprefix("kernel ").removeprefix("peer ")
            shift = (4, -12 if label.endswith("portable") else 5)
            axis.annotate(label, (ns[dtype, entry], value), shift, textcoords="offset points", fontsize=8)
        if (dtype, "memcpy") in ns:
            axis.axvline(ns[dtype, "memcpy"], color="C7", lw=0.8, ls=":")
        axis.set_title(f"tanh, {dtype} (dotted: memcpy)")
        axis.set_xlabel("ns per element, L2")
        axis.margins(0.25)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("largest absolute error")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    errors(folder / "act_errors.svg")
    pareto(ROOT / "results" / "act.csv", folder / "act_pareto.svg")
    sys.exit(0)
