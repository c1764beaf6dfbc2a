"""Networks that were not written for the engine, compiled and compared with PyTorch; writes results/zoo.csv.

    make zoo                                              # .venv-zoo: rarefy, timm and transformers
    .venv-zoo/bin/python benchmarks/zoo.py                # half an hour on a quiet machine; goes on where it stopped
    .venv-zoo/bin/python benchmarks/zoo.py --quick        # differences alone, kernels by rule
    .venv-zoo/bin/python benchmarks/zoo.py --only resnet18 gpt2 --again
    .venv-zoo/bin/python benchmarks/zoo.py --print        # stored results; --fill puts them into docs/results/zoo.md

A network is a process of its own on one pinned thread; one that crashes or hangs gets a row that says so. Random
weights, of each convolution and linear layer but the first the largest tenth (benchmarks/zoo_networks.py). ``error`` is
the largest difference from PyTorch as a share of the largest output, ``engine64`` and ``eager64`` are those of the two
from PyTorch in float64. Times are CPU times of the thread, PyTorch and the engine in turn; ``speedup`` is the median of
their ratios round by round; beside them at batch 1 onnxruntime runs what PyTorch exports for that shape, and
``ort_speedup`` is its time through the engine's. The engine is compiled for batch 1 and runs batch 4, too.
``native`` is the share of profiled time in native steps. Rows of another processor stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import results
import zoo_tables
from zoo_networks import NETWORKS, Network

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results" / "zoo.md"
#: Between this line and the end docs/results/zoo.md is written by --fill.
MARK = "<!-- benchmarks/zoo.py --fill -->\n"

ROUNDS = 9
#: Seconds after which a network is given up.
LIMIT = 480

_BATCHED = ("error", "engine64", "eager64", "eager_ms", "engine_ms", "speedup")
COLUMNS = (
    *("network", "source", "input", "chosen", "density", "macs", "native"),
    *("compile_seconds", "compile_cpu_seconds", "measuring_seconds"),
    *(f"{name}_{batch}" for batch in (1, 4) for name in _BATCHED),
    *("file", "file_mb", "load_ms", "ort_ms_1", "ort_speedup_1", "ort_note", "rounds", "load", "seconds", "note"),
)


def run(network: Network, quick: bool) -> dict[str, Any]:
    """The network's row."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    rounds = 0 if quick else ROUNDS
    about = {"network": network.name, "rounds": rounds, "core": core}
    command = [sys.executable, str(HERE / "zoo_worker.py"), json.dumps(about)]
    begun, load = time.perf_counter(), os.getloadavg()[0]
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), "network": network.name, "source": network.source}
    row.update(input=network.shape, rounds=rounds or "", load=round(load, 1))
    said, ended = _answers(command)
    for line in said:
        row.update(json.loads(line))
    if not row.pop("failed", False) and ended:
        row["note"] = ended
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return {**row, **results.provenance()}


def _answers(command: list[str]) -> tuple[list[str], str]:
    """The lines that a worker said, and how it ended where it did not end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said, words = process.communicate(timeout=LIMIT)
        last = (words.strip().splitlines() or [""])[-1]
        ended = f"the process ended with {process.returncode}: {last}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        ended = f"not done after {LIMIT} s"
    return said.splitlines(), ended


def line_of(row: dict[str, Any]) -> str:
    """What is printed of a row as it comes."""
    speeds = f"{row['speedup_1']:>6} {row['ort_speedup_1']:>6} {row['speedup_4']:>6}" if row["speedup_1"] else ""
    errors = f"{row['error_1']:>8} {row['error_4']:>8}"
    return f"{row['network']:30} {errors} {speeds}  {row['seconds']:6} s  {row['chosen']}  {row['note']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), metavar="NETWORK", help="these; others stay")
    parser.add_argument("--quick", action="store_true", help="differences alone, nothing timed")
    parser.add_argument("--again", action="store_true", help="those, too, that were measured at this commit already")
    parser.add_argument("--print", action="store_true", help="print the stored results, measure nothing")
    parser.add_argument(
        "--fill", action="store_true", help="write the stored results into docs/results/zoo.md, measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.print or arguments.fill:
        text = zoo_tables.page(results.read("zoo"))
        if arguments.fill:
            words, mark, _ = PAGE.read_text().partition(MARK)
            PAGE.write_text(f"{words}{mark}{text}\n")
        else:
            print(text)
        return
    unknown = sorted(set(arguments.only) - set(NETWORKS))
    if unknown:
        raise SystemExit(f"no such network: {', '.join(unknown)}; there is {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    here, commit = results.processor(results.provenance()), results.commit()
    for name in arguments.only:
        known: list[dict[str, Any]] = [{**dict.fromkeys(COLUMNS, ""), **row} for row in results.read("zoo")]
        rows = {row["network"]: row for row in known if results.processor(row) == here}
        others = [row for row in known if results.processor(row) != here]
        old = rows.get(name)
        done = old is not None and old["commit"] == commit and (arguments.quick or bool(old["rounds"]))
        if done and not commit.endswith("-dirty") and not arguments.again:
            continue
        new = run(NETWORKS[name], arguments.quick)
        print(line_of(new), flush=True)
        rows[name] = new
        results.write("zoo", [*others, *(rows[each] for each in NETWORKS if each in rows)])
    print(zoo_tables.summary([row for row in results.read("zoo") if results.processor(row) == here]))


if __name__ == "__main__":
    main()
