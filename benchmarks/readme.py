"""The table of README.md, from results/*.csv: ``python benchmarks/readme.py`` prints it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev

import act
import engine_tables
import results
import zoo_tables

Row = dict[str, str]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def of(name: str, **columns: str) -> list[Row]:
    """The rows of results/NAME.csv that have these."""
    return [row for row in results.read(name) if all(row[key] == value for key, value in columns.items())]


def rows() -> Iterator[tuple[str, str, str]]:
    """What was measured, the figure, and the command that prints it."""
    ours = of("fashion-mnist", method="AutoSparse, accuracy", target="0.9")
    dense, sparse = (
        [float(row["test_accuracy"]) for row in found] for found in (of("fashion-mnist", method="dense"), ours)
    )
    flops = mean(float(row["inference_flops_ratio"]) for row in ours)
    yield (
        "AutoSparse, 90 % zeros, small CNN: accuracy, dense accuracy, inference FLOPs",
        f"{spread(sparse)}, {spread(dense)}, {flops:.3f}",
        "fashion_mnist",
    )
    characters = [
        spread([float(row["test_accuracy"]) for row in of("compare-glyphs", label=label, epochs=epochs)])
        for label, epochs in (("AutoSparse, band", "64"), ("Feather", "40"), ("dense", "40"))
    ]
    yield (
        "printed characters, a tenth of the FLOPs, half of dense training: `band`, Feather, dense",
        ", ".join(characters),
        "comparison",
    )
    overhead = {row["network"]: float(row["overhead_percent"]) for row in results.read("overhead")}
    yield (
        "added to a training step of ResNet-20 and the small CNN, one thread",
        f"{overhead['resnet20']:.0f} %, {overhead['fashion_cnn']:.0f} %",
        "overhead",
    )
    ns = act.read()
    speedups = [
        ns["L2", act.B, theirs] / ns["L2", act.B, ours]
        for theirs, ours in (
            ("torch.tanh", "kernel tanh exact"),
            ("onednn tanh", "kernel tanh exact"),
            ("torch.gelu", "kernel gelu exact"),
        )
    ]
    yield (
        "bfloat16 in cache: exact tanh over PyTorch's and oneDNN's, exact GELU over PyTorch's",
        f"{speedups[0]:.0f}x, {speedups[1]:.0f}x, {speedups[2]:.1f}x",
        "act",
    )
    for machine, found in engine_tables.machines(results.read("engine")).items():
        here = engine_tables.cell(found, "resnet50-90 b1")
        int8 = float(here["openvino", "int8", "1"]["speedup"])
        where = "Zen 5, earlier build" if "AMD" in machine else "Emerald Rapids"
        yield (
            f"ResNet-50, 90 % zeros, {where}: over the best dense float32, dense int8",
            f"{engine_tables.times(engine_tables.best_dense(here))}x, {int8:.2f}x",
            "engine",
        )
    int8_rows = of("engine-int8", cell="resnet50-90 b1", precision="int8")
    best: dict[str, float] = {}
    for row in int8_rows:
        if row["runtime"] in ("openvino", "onnxruntime"):
            isa = results.processor(row).partition(", ")[2]
            best[isa] = min(best.get(isa, math.inf), float(row["speedup"]))
    yield (
        f"the same in int8, {', '.join(best)}: over the best dense int8",
        ", ".join(f"{engine_tables.times(each)}x" for each in best.values()),
        "int8",
    )
    networks = [row for row in results.read("zoo") if zoo_tables.compiled(row)]
    networks = [
        row for row in networks if results.processor(row) == results.processor(networks[-1])
    ]  # the processor measured last
    means = [
        zoo_tables.geometric_mean([float(row[name]) for row in networks if row[name]])
        for name in ("speedup_1", "ort_speedup_1")
    ]
    yield (
        f"{len(networks)} other networks, 90 % zeros, {networks[0]['native_isa'].partition('_')[0]}: "
        "over PyTorch, onnxruntime, geometric means",
        f"{means[0]:.2f}x, {means[1]:.2f}x",
        "zoo",
    )
    gates = {row["name"]: float(row["ge"]) for row in results.read("rtl") if row["ge"]}
    yield (
        "gates of a tanh with K-TanH's largest error: searched, published",
        f"{gates['tanh_bf16_area_00892']:.0f}, {gates['K-TanH, shift_add, 0 stages']:.0f}",
        "rtl",
    )


def table() -> str:
    """In Markdown."""
    lines = []
    for what, measured, script in rows():
        # The first two measure again, the third does nothing else.
        option = "" if script in ("fashion_mnist", "overhead", "comparison") else " --print"
        lines.append((what, measured, f"`python benchmarks/{script}.py{option}`"))
    return engine_tables.table(["what", "measured", "printed by"], lines)


if __name__ == "__main__":
    print(table())
