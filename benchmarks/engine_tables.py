"""Tables of results/engine.csv in Markdown, and what was asked for beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import results

Row = Mapping[str, str]

DENSE = ("onnxruntime", "openvino", "torch.compile")
NAMES = {"openvino": "OpenVINO"}
NETWORKS = {"resnet50": "ResNet-50", "mobilenet_v1": "MobileNetV1"}
#: Networks of other kinds, as engine_networks.py has them, and BERT.
OTHERS = {
    "bert": "BERT-base, 128 tokens",
    "vit": "ViT-B/16, 224x224",
    "convnext": "ConvNeXt-T, 224x224",
    "yolo": "a detector like YOLOv8-n, 320x320",
    "whisper": "Whisper-tiny's encoder, 30 s",
    "rnnoise": "RNNoise, 100 frames",
    "unet": "a U-Net, 256x256",
}

#: Of every cell: at least how many times faster than the best dense peer, and than deepsparse.
SPEEDUPS: dict[str, tuple[float | None, float | None]] = {
    "resnet50-80 b1": (1.8, 2.0),
    "resnet50-90 b1": (3.0, 2.4),
    "resnet50-95 b1": (4.0, 2.8),
    "resnet50-autosparse-0.8 b1": (1.8, 2.0),
    "resnet50-autosparse-0.9 b1": (3.0, 2.4),
    "resnet50-autosparse-0.95 b1": (4.0, 2.8),
    "resnet50-90erk b1": (None, None),
    "resnet50-90 b16": (2.8, 1.0),
    "resnet50-autosparse-0.9 b16": (2.8, 1.0),
    "mobilenet_v1-90 b1": (1.6, None),
    "mobilenet_v1-90 b16": (2.5, None),
}


@dataclass(frozen=True)
class Target:
    """Something asked for and what was measured, in words."""

    what: str
    asked: str
    measured: str
    met: bool


def network(name: str) -> str:
    """In words: "ResNet-50, 90 % by AutoSparse"."""
    kind, _, variant = name.partition("-")
    if variant.startswith("autosparse"):
        how = f"{100 * float(variant.removeprefix('autosparse-')):g} % by AutoSparse"
    else:
        how = f"{variant.removesuffix('erk')} % {'by ERK' if variant.endswith('erk') else 'of each layer'}"
    return f"{NETWORKS[kind]}, {how}"


def cell(rows: Sequence[Row], name: str) -> dict[tuple[str, str, str], Row]:
    """The rows of a cell by runtime, precision and threads."""
    return {(row["runtime"], row["precision"], row["threads"]): row for row in rows if row["cell"] == name}


def best_dense(found: Mapping[tuple[str, str, str], Row]) -> float:
    """How many times faster than the best peer that makes nothing of zeros."""
    return min(float(found[name, "float32", "1"]["speedup"]) for name in DENSE if (name, "float32", "1") in found)


def times(ratio: float) -> str:
    """With two decimals, never rounded up: 1.796 does not reach 1.80."""
    return f"{math.floor(100 * ratio) / 100:.2f}"


def ms(row: Row | None) -> str:
    """Three digits that count, and all before the point."""
    if row is None:
        return ""
    value = float(row["ms"])
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speeds(rows: Sequence[Row]) -> str:
    """Float32 on one thread: milliseconds a batch, and how many times faster."""
    lines = []
    for name in SPEEDUPS:
        found = cell(rows, name)
        if ("rarefy", "float32", "1") not in found:
            continue
        ours = found["rarefy", "float32", "1"]
        peers = [found.get((peer, "float32", "1")) for peer in (*DENSE, "deepsparse")]
        sparse = peers[-1]
        lines.append(
            [
                network(ours["network"]),
                ours["batch"],
                f"{100 * float(ours['macs']):.1f} %",
                ms(ours),
                *map(ms, peers),
                times(best_dense(found)),
                "" if sparse is None else times(float(sparse["speedup"])),
            ]
        )
    peers_named = [NAMES.get(peer, peer) for peer in (*DENSE, "deepsparse")]
    return table(
        ["ms a batch", "batch", "MACs left", "rarefy", *peers_named, "against the best dense", "against deepsparse"],
        lines,
    )


def precisions(rows: Sequence[Row]) -> str:
    """ResNet-50 at 90 % beside dense runtimes at lower precision."""
    lines = []
    for name in ("resnet50-90 b1", "resnet50-90 b16"):
        for (runtime, precision, _), row in cell(rows, name).items():
            if runtime == "rarefy" or precision != "float32":
                zeros = "dense" if float(row["zeros"]) == 0 else f"{100 * float(row['zeros']):.0f} % zeros"
                ratio = f"{float(row['speedup']):.2f}"
                lines.append([row["batch"], f"{NAMES.get(runtime, runtime)}, {precision}, {zeros}", ms(row), ratio])
    return table(["batch", "ResNet-50", "ms a batch", "time through rarefy's in float32"], lines)


def others(rows: Sequence[Row]) -> str:
    """Networks of other kinds at 90 %, batch 1: float32, and int8; empty where none was measured."""
    lines = []
    for name, words in OTHERS.items():
        found = cell(rows, f"{name}-90 b1")
        if ("rarefy", "float32", "1") in found:
            measured = [found.get((peer, "float32", "1")) for peer in ("rarefy", *DENSE, "deepsparse")]
            int8 = [found.get((peer, "int8", "1")) for peer in ("rarefy", "onnxruntime", "openvino")]
            lines.append([words, *map(ms, measured), times(best_dense(found)), *map(ms, int8)])
    names = ["rarefy", *(NAMES.get(peer, peer) for peer in (*DENSE, "deepsparse"))]
    int8_names = [f"{NAMES.get(peer, peer)}, int8" for peer in ("rarefy", "onnxruntime", "openvino")]
    return table(["ms a call", *names, "against the best dense", *int8_names], lines) if lines else ""


def targets(rows: Sequence[Row]) -> list[Target]:
    """Everything that was asked for, of what is measured."""
    judged = []
    for name, (dense, sparse) in SPEEDUPS.items():
        found = cell(rows, name)
        if ("rarefy", "float32", "1") not in found:
            continue
        ours = found["rarefy", "float32", "1"]
        what = f"{network(ours['network'])}, batch {ours['batch']}"
        if dense is not None:
            ratio = best_dense(found)
            judged.append(Target(f"{what}: best dense peer", f">= {dense:g}x", f"{times(ratio)}x", ratio >= dense))
        if sparse is not None and ("deepsparse", "float32", "1") in found:
            ratio = float(found["deepsparse", "float32", "1"]["speedup"])
            judged.append(Target(f"{what}: deepsparse", f">= {sparse:g}x", f"{times(ratio)}x", ratio >= sparse))
        if ("rarefy", "bfloat16", "1") in found:
            half = found["rarefy", "bfloat16", "1"]
            ratio, size = float(half["speedup"]), float(half["weight_mb"]) / float(ours["weight_mb"])
            measured = f"{ratio:.2f} of the time, {size:.2f} of the memory"
            asked = "not slower, smaller"
            judged.append(Target(f"{what}: bfloat16 weights", asked, measured, ratio <= 1 and size < 1))
    return judged + _memory_and_seconds(rows) + _threads(rows)


def _memory_and_seconds(rows: Sequence[Row]) -> list[Target]:
    judged = []
    for row in rows:
        if row["runtime"] != "rarefy" or row["network"] != "resnet50-90" or row["threads"] != "1":
            continue
        if row["cell"].endswith("threads"):
            continue
        what = f"{network(row['network'])}, batch {row['batch']}, {row['precision']}"
        weights, scratch, bound = (float(row[key]) for key in ("weight_mb", "scratch_mb", "bound_mb"))
        measured = f"{weights:.1f} + {scratch:.1f} MB"
        judged.append(Target(f"{what}: memory", f"<= {bound:.1f} MB", measured, weights + scratch <= bound))
        seconds, clock = float(row["compile_cpu_seconds"]), float(row["compile_seconds"])
        share = 100 * float(row["measuring_seconds"]) / clock
        by_clock = f"{clock:.0f} s by the clock at a load of {row['load']}, {share:.0f} % of them measuring"
        measured = f"{seconds:.1f} s of CPU time ({by_clock})"
        judged.append(Target(f"{what}: compiling", "< 20 s", measured, seconds < 20))
    return judged


def _threads(rows: Sequence[Row]) -> list[Target]:
    judged = []
    for name in ("resnet50-90 b1 threads", "resnet50-90 b16 threads"):
        found = cell(rows, name)
        if ("rarefy", "float32", "2") in found:
            two = found["rarefy", "float32", "2"]
            ratio = 1 / float(two["speedup"])
            what = f"{network(two['network'])}, batch {two['batch']}: two threads, at a load of {two['load']}"
            judged.append(Target(what, ">= 1.8x", f"{times(ratio)}x", ratio >= 1.8))
    return judged


def judged(rows: Sequence[Row]) -> str:
    """:func:`targets` as a table."""
    lines = [[t.what, t.asked, t.measured, "met" if t.met else "missed"] for t in targets(rows)]
    return table(["ResNet-50 v1.5 and MobileNetV1, 224x224", "goal", "measured", ""], lines)


def machines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each processor."""
    names = sorted(set(map(results.processor, rows)))
    return {name: [row for row in rows if results.processor(row) == name] for name in names}


def tables(rows: Sequence[Row]) -> str:
    """All of them, machine by machine."""
    parts = [
        (f"### {name}", speeds(own), precisions(own), judged(own), others(own)) for name, own in machines(rows).items()
    ]
    return "\n\n".join(line for part in parts for line in part if line)
