"""The picture of docs/results/hardware.md: ``python benchmarks/rtl_figures.py`` draws docs/figures/rtl_pareto.svg.

From results/rtl.csv: largest error against area and against delay, of peers, K-TanH, tables with carry, and logic.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import results

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "rarefy"  # the same file each time

ROOT = Path(__file__).parents[1]
PUBLISHED = "K-TanH, shift_add, 0 stages"

Rows = Sequence[Mapping[str, str]]


def front(rows: Rows, cost: str) -> list[tuple[float, float]]:
    """The points that none is better than in both, by rising cost, as corners of a staircase."""
    points = sorted((float(row[cost]), float(row["max_abs"])) for row in rows)
    found: list[tuple[float, float]] = []
    for x, y in points:
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def draw(axis: Axes, rows: Rows, cost: str, label: str, ticks: Sequence[float]) -> None:
    """One panel."""
    kinds: dict[str, tuple[Rows, str, str]] = {
        "other units": ([r for r in rows if r["part"] == "peers"], "s", "C7"),
        "K-TanH, published table": ([r for r in rows if r["name"] == PUBLISHED], "D", "C3"),
        "K-TanH with carry, searched": ([r for r in rows if r["part"] == "carry"], "^", "C1"),
        "logic within the error, searched": ([r for r in rows if r["part"] == "logic"], "o", "C0"),
    }
    for name, (chosen, marker, color) in kinds.items():
        axis.plot(
            [float(r[cost]) for r in chosen],
            [float(r["max_abs"]) for r in chosen],
            marker,
            color=color,
            label=name,
            ms=5,
        )
    for rows_of, color in ((kinds["other units"][0], "C7"), (kinds["logic within the error, searched"][0], "C0")):
        corners = front(rows_of, cost)
        axis.step([x for x, _ in corners], [y for _, y in corners], where="post", color=color, lw=0.8, alpha=0.7)
    for r in kinds["other units"][0]:
        below = r["name"] in ("lines, 32", "uniform, 512", "RALUT")  # where another label stands above
        at, offset = (float(r[cost]), float(r["max_abs"])), (5, -9) if below else (5, 3)
        axis.annotate(r["name"], at, offset, textcoords="offset points", fontsize=7, color="0.35")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3, which="both", lw=0.5)
    axis.margins(x=0.15)


def main() -> int:
    """Draw."""
    rows = [row for row in results.read("rtl") if row["max_abs"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    draw(axes[0], rows, "ge", "area, gate equivalents (area script)", (30, 50, 100, 200, 500, 1000))
    draw(axes[1], rows, "delay_ns", "delay, ns (speed script)", (0.4, 0.6, 0.8, 1, 1.5, 2, 3))
    axes[0].set_ylabel("largest absolute error of tanh, bfloat16")
    axes[1].legend(fontsize=8, loc="upper right")
    figure.suptitle("tanh units in OSU 0.18 µm: lower left is better", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "rtl_pareto.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
