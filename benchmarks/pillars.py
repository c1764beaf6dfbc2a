"""The picture of README.md, docs/figures/pillars.svg, from results/*.csv: ``python benchmarks/pillars.py``.

A panel for each pillar: accuracy against inference FLOPs, milliseconds of ResNet-50, nanoseconds of an activation, and
gates of a tanh unit; two by two, and in pillars-narrow.svg one below the other, for a telephone's screen.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import act
import comparison
import engine_tables
import results

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rarefy"  # the same file each time
matplotlib.rcParams["font.size"] = 11

FIGURES = results.FOLDER.parent / "docs" / "figures"
OURS, THEIRS, OTHER = "#2962cc", "#8a8f98", "#c4622d"
METHODS = ("AutoSparse, accuracy", "AutoSparse, cost", "ST-3, no rescaling", "STR", "DST")


def train(axis: Axes) -> None:
    """Accuracy at equal inference FLOPs, means over the seeds."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in comparison.read("equal-flops"):
        found[row["label"]][float(row["target"])].append(float(row["test_accuracy"]))
    for name, style in zip(METHODS, ("o-", "o--", "s-", "^-", "D-"), strict=True):
        points = sorted((100 * target, mean(values)) for target, values in found[name].items())
        colour = OURS if name.startswith("AutoSparse") else OTHER if name.startswith("ST-3") else THEIRS
        axis.plot(*zip(*points, strict=True), style, label=name, color=colour, ms=5)
    axis.set_xlabel("inference FLOPs, % of the dense network's")
    axis.set_ylabel("test accuracy, Fashion-MNIST, %")
    axis.set_title("Train sparse: a small CNN")
    axis.set_ylim(84.5)
    axis.legend(fontsize=9, loc="lower right")


def bars(axis: Axes, values: dict[str, float], unit: str, ours: tuple[str, ...]) -> None:
    """One horizontal bar a name, the first on top."""
    names = list(values)
    axis.barh(names, list(values.values()), color=[OURS if name in ours else THEIRS for name in names])
    for place, value in enumerate(values.values()):
        axis.annotate(f" {value:.3g}", (value, place), va="center", fontsize=10)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.margins(x=0.15)


def run(axis: Axes) -> None:
    """ResNet-50 with 90 % zeros beside dense runtimes in float32 and int8."""
    rows = engine_tables.machines(results.read("engine"))[
        "Intel(R) Xeon(R) Processor"
    ]  # this build, not an earlier one
    found = engine_tables.cell(rows, "resnet50-90 b1")
    names = {
        "rarefy, 90 % zeros": ("rarefy", "float32", "1"),
        "deepsparse, 90 % zeros": ("deepsparse", "float32", "1"),
        "onnxruntime": ("onnxruntime", "float32", "1"),
        "OpenVINO": ("openvino", "float32", "1"),
        "torch.compile": ("torch.compile", "float32", "1"),
        "OpenVINO, int8": ("openvino", "int8", "1"),
    }
    bars(
        axis,
        {name: float(found[key]["ms"]) for name, key in names.items() if key in found},
        "ms an image, one thread of a Xeon",
        ("rarefy, 90 % zeros",),
    )
    axis.set_title("Run sparse: ResNet-50")


def activate(axis: Axes) -> None:
    """Bfloat16 functions beside PyTorch's, arrays in the second cache."""
    ns = act.read()
    values = {}
    for function in ("tanh", "gelu_tanh", "silu", "sigmoid", "gelu"):
        values[f"{act.NAMES[function]}"] = ns["L2", act.B, f"kernel {function} exact"]
        values[f"PyTorch's {act.NAMES[function]}"] = ns["L2", act.B, f"torch.{function}"]
    bars(
        axis,
        values,
        "ns an element, bfloat16, correctly rounded",
        tuple(name for name in values if not name.startswith("PyTorch")),
    )
    axis.set_title("Activate: exact functions")


def build(axis: Axes) -> None:
    """Gate equivalents of tanh units with at most K-TanH's error, and HardTanh's with its own."""
    gates = {row["name"]: float(row["ge"]) for row in results.read("rtl") if row["ge"]}
    names = {
        "HardTanh, error 0.238": "HardTanh",
        "searched, error 0.0089": "tanh_bf16_area_00892",
        "K-TanH, error 0.0089": "K-TanH, shift_add, 0 stages",
        "lines, 16, error 0.0055": "lines, 16",
        "exact, error 0.0019": "exact",
        "searched, error 0.0019": "tanh_bf16_area_001945",
    }
    values = dict(sorted(((name, gates[key]) for name, key in names.items()), key=lambda item: item[1]))
    bars(axis, values, "gate equivalents", tuple(name for name in names if name.startswith("searched")))
    axis.set_title("Build: tanh units in bfloat16")


def picture(path: Path, rows: int, columns: int, inches: tuple[float, float]) -> None:
    """Draw the four panels into a file, in so many rows and columns."""
    figure, axes = plt.subplots(rows, columns, figsize=inches)
    for axis, draw in zip(axes.flat, (train, activate, run, build), strict=True):
        draw(axis)
        axis.grid(alpha=0.3, axis="both" if draw is train else "x")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(pad=1.5)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Draw."""
    picture(FIGURES / "pillars.svg", 2, 2, (12, 8))
    picture(FIGURES / "pillars-narrow.svg", 4, 1, (5.4, 14))
    return 0


if __name__ == "__main__":
    sys.exit(main())
