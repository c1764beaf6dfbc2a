"""The engine beside its peers: whole networks, run in turn on one pinned thread; writes results/engine.csv.

    make peers                                  # .venv-peers: onnxruntime, OpenVINO and deepsparse
    python benchmarks/engine_masks.py           # once, a quarter of an hour: the trained masks
    python benchmarks/engine.py [--only "resnet50-90 b1"] [--rounds 11]
    python benchmarks/engine.py --print         # the tables of docs/results/engine.md from the file

Every runtime is a process of its own on the same core; a round asks each in turn for some runs. ``ms`` is the median of
the CPU time of a run, which a busy machine disturbs less than the clock (``wall_ms``); with more than one thread it is
the clock's. ``speedup`` is the median over the rounds of a runtime's time through rarefy's (float32) in the same round.
Rows of another processor stay in the file.
``error`` is the largest difference from PyTorch as a share of the largest output, for int8 on random calibration.
``network`` is what is timed; runtimes that make nothing of zeros run the dense one (``zeros`` 0) where that saves
building it again: torch.compile, whose time does not depend on the weights, and the int8 and bfloat16 ones.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import engine_models
import engine_tables
import results
from engine_networks import NETWORKS
from rarefy import cost

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"

#: CPU time of a round that a runtime gets at least, as runs of 40 ms.
RUNS = {1: 5, 16: 1}


#: Milliseconds of every run, by clock ("cpu", "wall") and round.
Times = dict[str, list[list[float]]]


@dataclass(frozen=True)
class Runtime:
    """A runtime at a precision and a number of threads; ``dense``: it is given the dense network."""

    name: str
    precision: str = "float32"
    dense: bool = False
    threads: int = 1

    @property
    def ours(self) -> bool:
        """Whether it lives in this environment."""
        return self.name in ("rarefy", "torch.compile")


RAREFY = Runtime("rarefy")
FLOAT = (
    RAREFY,
    Runtime("onnxruntime"),
    Runtime("openvino"),
    Runtime("torch.compile", dense=True),
    Runtime("deepsparse"),
)
SMALL = (
    Runtime("rarefy", "bfloat16"),
    Runtime("openvino", "bfloat16", dense=True),
    Runtime("openvino", "int8", dense=True),
    Runtime("onnxruntime", "int8", dense=True),
)


@dataclass(frozen=True)
class Cell:
    """What is run side by side; ``wall``: by the clock, since there are threads."""

    network: str
    batch: int
    runtimes: tuple[Runtime, ...] = FLOAT
    wall: bool = False

    def __str__(self) -> str:
        return f"{self.network} b{self.batch}" + " threads" * self.wall


OTHERS_INT8 = (Runtime("rarefy", "int8"), *SMALL[2:])
THREADS = (RAREFY, *(Runtime(name, threads=2) for name in ("rarefy", "onnxruntime", "openvino")))

CELLS = (
    Cell("resnet50-90", 1, FLOAT + SMALL),
    Cell("resnet50-80", 1),
    Cell("resnet50-95", 1),
    Cell("resnet50-90", 16, (*FLOAT, SMALL[0], SMALL[2])),
    Cell("resnet50-autosparse-0.9", 1),
    Cell("resnet50-autosparse-0.8", 1),
    Cell("resnet50-autosparse-0.95", 1),
    Cell("resnet50-autosparse-0.9", 16),
    Cell("mobilenet_v1-90", 1),
    Cell("mobilenet_v1-90", 16),
    Cell("resnet50-90erk", 1),
    Cell("resnet50-90", 1, THREADS, wall=True),
    Cell("resnet50-90", 16, THREADS, wall=True),
    *(Cell(f"{name}-90", 1, (*FLOAT, *OTHERS_INT8)) for name in ("bert", *NETWORKS)),
)


class Worker:
    """A process that runs one network in one runtime."""

    def __init__(self, runtime: Runtime, network: str, batch: int) -> None:
        self.runtime, self.network = runtime, network
        file = engine_models.onnx_int8 if runtime.precision == "int8" else engine_models.onnx
        cores = sorted(os.sched_getaffinity(0), reverse=True) if hasattr(os, "sched_getaffinity") else []
        about = {
            "runtime": runtime.name,
            "precision": runtime.precision,
            "model": network if runtime.ours else str(file(network)),
            "input": str(input_file(network, batch)),
            "threads": runtime.threads,
            "cores": cores[: runtime.threads],
        }
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until the process ends)
        self._process = subprocess.Popen(
            [str(sys.executable if runtime.ours else PEERS), str(HERE / "engine_worker.py"), json.dumps(about)],
            env={**os.environ, "OMP_NUM_THREADS": str(runtime.threads), "NM_BIND_THREADS_TO_CORES": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.about = self._answer()

    def ask(self, *words: object) -> dict[str, Any]:
        """Send a request; gives its answer. Raises RuntimeError where the process ended."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            self._said.seek(0)
            last = self._said.read().strip().splitlines()[-1:]
            raise RuntimeError(f"{self.runtime.name} on {self.network} ended: {' '.join(last)}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def input_file(network: str, batch: int) -> Path:
    """What the network gets, as a file."""
    path = engine_models.FOLDER / f"input-{'x'.join(map(str, (batch, *engine_models.shape(network))))}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, engine_models.inputs(batch, network).numpy())
    return path


def error_of(worker: Worker, expected: Tensor) -> float:
    """The largest difference from PyTorch's output, as a share of the largest output."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.npy"
        worker.ask("output", path)
        return float((torch.from_numpy(np.load(path)) - expected).abs().max() / expected.abs().max())


def largest_activations(model: nn.Module, x: Tensor) -> int:
    """Bytes of the two largest outputs of its layers for one image, those in place counted once."""
    sizes: dict[int, int] = {}
    kept = []

    def look(module: nn.Module, given: object, output: object) -> None:
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]  # a recurrent layer's is a pair
        kept.extend(made)  # so that no storage is used again
        sizes.update((each.untyped_storage().data_ptr(), each.nbytes) for each in made)

    hooks = [module.register_forward_hook(look) for module in model.modules() if not list(module.children())]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(sorted(sizes.values())[-2:])


def time_in_turn(
    cell: Cell, workers: dict[Runtime, Worker], rounds: int
) -> dict[Runtime, dict[str, list[list[float]]]]:
    """Milliseconds of every run, by runtime, clock and round."""
    times: dict[Runtime, dict[str, list[list[float]]]] = {runtime: {"cpu": [], "wall": []} for runtime in workers}
    order = list(workers)
    for turn in range(rounds):
        for runtime in (*order[turn % len(order) :], *order[: turn % len(order)]):
            if cell.batch == 1:
                workers[runtime].ask("run", 1)  # the others have driven its weights from the caches
            for clock, found in workers[runtime].ask("run", RUNS[cell.batch]).items():
                times[runtime][clock].append(found)
    return times


def measure(cell: Cell, workers: dict[Runtime, Worker], rounds: int) -> list[dict[str, Any]]:
    """Run the workers in turn; a row for each."""
    load = os.getloadavg()[0]
    times = time_in_turn(cell, workers, rounds)
    load = (load + os.getloadavg()[0]) / 2
    clock = "wall" if cell.wall else "cpu"
    middle = {runtime: [statistics.median(one) for one in found[clock]] for runtime, found in times.items()}
    about = {key: value for key, value in results.provenance().items() if key != "threads"}
    x = engine_models.inputs(cell.batch, cell.network)
    models = {name: engine_models.build(name) for name in {worker.network for worker in workers.values()}}
    with torch.no_grad():
        expected = {name: model(x) for name, model in models.items()}
    rows = []
    for runtime, worker in workers.items():
        counted = cost.count(models[worker.network], x[:1])
        flat = {kind: [ms for one in found for ms in one] for kind, found in times[runtime].items()}
        ratios = [theirs / ours for theirs, ours in zip(middle[runtime], middle.get(RAREFY, []), strict=False)]
        rows.append(
            {
                "cell": str(cell),
                "network": cell.network,
                "batch": cell.batch,
                "runtime": runtime.name,
                "precision": runtime.precision,
                "threads": runtime.threads,
                "zeros": round(counted.sparsity, 4),
                "macs": round(counted.ratio, 4),
                "ms": round(statistics.median(flat[clock]), 3),
                "wall_ms": round(statistics.median(flat["wall"]), 3),
                "min_ms": round(min(flat[clock]), 3),
                "speedup": round(statistics.median(ratios), 3) if ratios else "",
                "error": f"{error_of(worker, expected[worker.network]):.1e}",
                "rounds": rounds,
                "load": round(load, 1),
                "version": worker.about["version"],
                **ours(runtime, worker, models[worker.network], x[:1]),
                **about,
            }
        )
    return rows


def ours(runtime: Runtime, worker: Worker, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What the engine tells of itself, empty for peers: seconds of compiling; megabytes beside the bound on them."""
    names = ("compile_seconds", "compile_cpu_seconds", "measuring_seconds", "weight_mb", "scratch_mb", "bound_mb")
    if runtime.name != "rarefy":
        return dict.fromkeys(names, "")
    told = worker.about
    size = 2 if runtime.precision == "bfloat16" else 4
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    compressed = sum(int(w.count_nonzero()) * size + w.numel() / 8 for w in weights)
    values = (
        told["compile_seconds"],
        told["compile_cpu_seconds"],
        told["measuring_seconds"],
        told["weight_bytes"] / 1e6,
        told["scratch_bytes"] / 1e6,
        1.2 * (compressed + largest_activations(model, x)) / 1e6,
    )
    return {name: round(value, 2) for name, value in zip(names, values, strict=True)}


@contextlib.contextmanager
def started(cell: Cell, kept: dict[object, Worker]) -> Iterator[dict[Runtime, Worker]]:
    """The workers of a cell, those that start; the ones with a dense network stay for the next cells."""
    workers: dict[Runtime, Worker] = {}
    try:
        for runtime in cell.runtimes:
            network = f"{cell.network.partition('-')[0]}-dense" if runtime.dense else cell.network
            key = (runtime, network, cell.batch)
            try:
                workers[runtime] = kept.get(key) or Worker(runtime, network, cell.batch)
            except RuntimeError as error:
                print(f"{cell}: left out: {error}", file=sys.stderr, flush=True)
                continue
            if runtime.dense:
                kept[key] = workers[runtime]
        yield workers
    finally:
        for runtime, worker in workers.items():
            if not runtime.dense:
                worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help='cells by a shell pattern: "resnet50-90 b1", "*b16"; others stay')
    parser.add_argument("--rounds", type=int, default=11, help="at batch 1; half as many at batch 16")
    parser.add_argument("--print", action="store_true", help="print the tables of the stored results, measure nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print(engine_tables.tables(results.read("engine")))
        return
    if not PEERS.exists():
        raise SystemExit(f"there is no {PEERS}: run make peers")
    torch.set_num_threads(1)
    kept: dict[object, Worker] = {}
    for cell in CELLS:
        if not fnmatch.fnmatchcase(str(cell), arguments.only):
            continue
        if "autosparse" in cell.network and not engine_models.path(cell.network).exists():
            print(f"{cell}: left out: run python benchmarks/engine_masks.py", file=sys.stderr, flush=True)
            continue
        with started(cell, kept) as workers:
            rows = measure(cell, workers, arguments.rounds if cell.batch == 1 else (arguments.rounds + 1) // 2)
        for row in rows:
            about = f"{row['runtime']:>14} {row['precision']:8} {row['ms']:9.3f} ms  {row['speedup']}"
            print(f"{cell!s:32}{about}  error {row['error']}  load {row['load']}", flush=True)
        here = (str(cell), results.processor(rows[0]))
        old = [row for row in results.read("engine") if (row["cell"], results.processor(row)) != here]
        results.write("engine", [*old, *rows])
    for worker in kept.values():
        worker.close()


if __name__ == "__main__":
    main()
