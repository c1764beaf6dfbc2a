"""The engine in int8 beside dense int8: whole networks, run in turn on one pinned thread; results/engine-int8.csv.

    make peers
    python benchmarks/int8.py [--only "resnet50-90 b1"] [--rounds 11]
    python benchmarks/int8.py --print

As benchmarks/engine.py, whose workers it asks: ``ms`` is the median of the CPU time of a run, ``speedup`` the median
over the rounds of a runtime's time through that of rarefy in int8 in the same round. The peers run the dense network,
but for deepsparse, which knows zeros.
``error`` is the largest difference from PyTorch in float32 as a share of the largest output, calibrated on random
pictures.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import engine
import engine_models
import engine_tables
import results
from rarefy import cost

OURS = engine.Runtime("rarefy", "int8")
PEERS = (engine.Runtime("openvino", "int8", dense=True), engine.Runtime("onnxruntime", "int8", dense=True))
DEEPSPARSE = engine.Runtime("deepsparse", "int8")  # which is given the sparse network, as we are
RUNTIMES = (OURS, engine.RAREFY, *PEERS)
#: The cells, and how many times faster than the best dense int8 they are to be; None: where zeros begin to pay.
CELLS = {
    engine.Cell("resnet50-dense", 1, RUNTIMES): None,
    engine.Cell("resnet50-50", 1, RUNTIMES): None,
    engine.Cell("resnet50-70", 1, RUNTIMES): None,
    engine.Cell("resnet50-80", 1, RUNTIMES): 1.9,
    engine.Cell("resnet50-90", 1, (*RUNTIMES, DEEPSPARSE)): 2.9,
    engine.Cell("resnet50-95", 1, RUNTIMES): 3.6,
    engine.Cell("resnet50-90x4", 1, (*RUNTIMES, DEEPSPARSE)): 3.8,
    engine.Cell("resnet50-90", 16, RUNTIMES): 2.5,
    engine.Cell("mobilenet_v1-90", 1, RUNTIMES): 2.7,
    engine.Cell("bert-90", 1, RUNTIMES): 1.5,
    engine.Cell("linear-50", 1, RUNTIMES): 1.6,
    engine.Cell("linear-70", 1, RUNTIMES): 2.3,
    engine.Cell("linear-90", 1, RUNTIMES): 7.0,
    engine.Cell("linear-90x4", 1, RUNTIMES): None,
}
GOALS = {str(cell): goal for cell, goal in CELLS.items()}


def measure(cell: engine.Cell, workers: dict[engine.Runtime, engine.Worker], rounds: int) -> list[dict[str, Any]]:
    """Run the workers in turn; a row for each."""
    load = os.getloadavg()[0]
    times = {runtime: found["cpu"] for runtime, found in engine.time_in_turn(cell, workers, rounds).items()}
    load = (load + os.getloadavg()[0]) / 2
    middle = {runtime: [statistics.median(one) for one in found] for runtime, found in times.items()}
    x, rows = engine_models.inputs(cell.batch, cell.network), []
    for runtime, worker in workers.items():
        model = engine_models.build(worker.network)
        with torch.no_grad():
            expected = model(x)
        counted = cost.count(model, x[:1])
        every = [ms for one in times[runtime] for ms in one]
        ratios = [theirs / ours for theirs, ours in zip(middle[runtime], middle[OURS], strict=True)]
        rows.append(
            {
                "cell": str(cell),
                "runtime": runtime.name,
                "precision": runtime.precision,
                "zeros": round(counted.sparsity, 4),
                "macs": round(counted.ratio, 4),
                "ms": round(statistics.median(every), 3),
                "min_ms": round(min(every), 3),
                "speedup": round(statistics.median(ratios), 3),
                "error": f"{engine.error_of(worker, expected):.1e}",
                "weight_mb": round(worker.about["weight_bytes"] / 1e6, 2) if runtime.name == "rarefy" else "",
                "rounds": rounds,
                "load": round(load, 1),
                "version": worker.about["version"],
                **{key: value for key, value in results.provenance().items() if key != "threads"},
            }
        )
    return rows


def tables(rows: Sequence[Mapping[str, str]]) -> str:
    """A table for each processor and instruction set."""
    parts = []
    for machine in dict.fromkeys(map(results.processor, rows)):
        own = [row for row in rows if results.processor(row) == machine]
        lines = []
        for name, goal in GOALS.items():
            found = {(row["runtime"], row["precision"]): row for row in own if row["cell"] == name}
            if not found:
                continue
            peers = [found.get((peer.name, "int8")) for peer in PEERS]
            best = min(float(peer["speedup"]) for peer in peers if peer is not None)
            ours = [found.get(("rarefy", precision)) for precision in ("float32", "int8")]
            network, _, batch = name.partition(" b")
            shown = "" if goal is None else f"{goal:g}"
            times = map(engine_tables.ms, (*ours, *peers, found.get(("deepsparse", "int8"))))
            lines.append([network, batch, *times, engine_tables.times(best), shown])
        head = ["ms a batch", "batch", "rarefy, float32", "rarefy, int8", "OpenVINO, dense int8",
                "onnxruntime, dense int8", "deepsparse, int8", "against the best dense int8", "goal"]  # fmt: skip
        parts.append(f"### {machine}\n\n{engine_tables.table(head, lines)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help='cells by a shell pattern: "resnet50-90 b1", "*b16"; others stay')
    parser.add_argument("--rounds", type=int, default=11, help="at batch 1; half as many at batch 16")
    parser.add_argument("--print", action="store_true", help="print the table of the stored results, measure nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print(tables(results.read("engine-int8")))
        return
    if not engine.PEERS.exists():
        raise SystemExit(f"there is no {engine.PEERS}: run make peers")
    torch.set_num_threads(1)
    kept: dict[object, engine.Worker] = {}
    for cell in CELLS:
        if not fnmatch.fnmatchcase(str(cell), arguments.only):
            continue
        with engine.started(cell, kept) as workers:
            rows = measure(cell, workers, arguments.rounds if cell.batch == 1 else (arguments.rounds + 1) // 2)
        for row in rows:
            print(f"{cell!s:20}{row['runtime']:>12} {row['precision']:8} {row['ms']:9.3f} ms  {row['speedup']}  "
                  f"error {row['error']}  load {row['load']}", flush=True)  # fmt: skip
        here = (rows[0]["cell"], results.processor(rows[0]))
        old = [row for row in results.read("engine-int8") if (row["cell"], results.processor(row)) != here]
        results.write("engine-int8", [*old, *rows])
    for worker in kept.values():
        worker.close()


if __name__ == "__main__":
    main()
