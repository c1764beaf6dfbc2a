"""One network of the zoo in a process of its own: compiled, compared, timed; for benchmarks/zoo.py.

    python zoo_worker.py '{"network": "resnet18", "rounds": 9, "core": 1}'

Answers in one line of JSON on standard output; without rounds nothing is timed.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo_networks
from rarefy import cost, engine

BATCHES = (1, 4)
#: CPU seconds of one measurement at least, as so many calls.
LEAST = 0.02
#: Of measuring kernels, at most about.
TUNE_SECONDS = 4.0
#: Above this share of the largest output onnxruntime's answer is another one.
ORT_ERROR = 1e-2

Run = Callable[..., Any]


def outputs(answer: Any) -> tuple[Tensor, ...]:
    """One or more."""
    return answer if isinstance(answer, tuple) else (answer,)


def difference(found: Any, expected: Any) -> float:
    """The largest difference as a share of the largest value expected, the worst of the outputs."""
    pairs = zip(outputs(found), outputs(expected), strict=True)
    # A maximum with NaN in it is NaN, and Python's max would lose it.
    shares = [((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs]
    return float(torch.stack(shares).max())


def compare(model: nn.Module, run: Run, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """How far the engine and PyTorch are from each other, and both from PyTorch in float64 where it has it."""
    with torch.no_grad():
        eager = model(*inputs)
    found = run(*inputs)
    differences = {"error": difference(found, eager)}
    try:
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    except RuntimeError:  # an operator without float64
        return differences
    return differences | {"engine64": difference(found, exact), "eager64": difference(eager, exact)}


def seconds(run: Run, inputs: tuple[Tensor, ...], calls: int) -> float:
    """CPU time of a call: the mean of so many."""
    begun = time.thread_time()
    for _ in range(calls):
        run(*inputs)
    return (time.thread_time() - begun) / calls


def time_in_turn(
    eager: Run, run: Run, inputs: tuple[Tensor, ...], rounds: int, ort: Run | None = None
) -> dict[str, float]:
    """Medians over the rounds of milliseconds a call, and of others' time through the engine's in the same round."""
    runs = [eager, run] if ort is None else [eager, run, ort]
    calls = []
    for each in runs:
        seconds(each, inputs, 1)
        calls.append(1 + int(LEAST / max(seconds(each, inputs, 1), 1e-6)))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for k in range(len(runs)):
            i = (turn + k) % len(runs)
            if calls[i] > 1:
                runs[i](*inputs)  # the others have driven its weights from the caches
            times[i].append(seconds(runs[i], inputs, calls[i]))
    ratios = [statistics.median(a / b for a, b in zip(theirs, times[1], strict=True)) for theirs in times]
    middle = [1e3 * statistics.median(each) for each in times]
    found = {"eager_ms": middle[0], "engine_ms": middle[1], "speedup": ratios[0]}
    return found if ort is None else {**found, "ort_ms": middle[2], "ort_speedup": ratios[2]}


def onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    """The model in onnxruntime on one thread, exported by PyTorch for these shapes alone.

    Raises whatever the two raise, and ValueError where the answer is another one.
    """
    import onnxruntime as ort

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*given: Tensor) -> list[Any]:
        result: list[Any] = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        return result

    with torch.no_grad():
        wrong = difference(tuple(map(torch.from_numpy, run(*inputs))), model(*inputs))
    if not wrong <= ORT_ERROR:
        raise ValueError(f"onnxruntime is off by {wrong:.1e}")
    return run


def macs_left(model: nn.Module, inputs: tuple[Tensor, ...]) -> float | str:
    """Multiply-accumulates with nonzero weights, as a share of all; nothing where they cannot be counted."""
    try:
        return round(cost.count(model, inputs).ratio, 4)
    except ValueError:
        return ""


def native_share(compiled: engine.Engine, inputs: Sequence[Tensor]) -> float:
    """Share of the time that is spent in native steps."""
    return sum(row.share for row in compiled.profile(*inputs, rounds=3).rows if row.kernel not in ("PyTorch", "oneDNN"))


def kept(compiled: engine.Engine, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """The size of the engine's file, the milliseconds that loading it takes, and whether it answers alike."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.engine"
        try:
            engine.save(compiled, path)
        except ValueError as error:
            return {"file": str(error).partition(":")[0]}
        times = []
        for _ in range(5):
            begun = time.thread_time()
            loaded = engine.load(path)
            times.append(1e3 * (time.thread_time() - begun))
        same = all(torch.equal(a, b) for a, b in zip(*map(outputs, (loaded(*inputs), compiled(*inputs))), strict=True))
        size = path.stat().st_size / 1e6
        return {
            "file": "same bits" if same else "other bits",
            "file_mb": f"{size:.2f}",
            "load_ms": f"{statistics.median(times):.2f}",
        }


def measure(about: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    network = zoo_networks.NETWORKS[about["network"]]
    model, density = zoo_networks.build(network)
    given = {batch: network.random(batch) for batch in BATCHES}
    source = network.source if network.source == "plain" else f"{network.source} {version(network.source)}"
    say({"source": source, "density": round(density, 4), "macs": macs_left(model, given[1])})
    # Without timing the kernels are chosen by rule.
    how: dict[str, Any] = {"choose": "measure" if about["rounds"] else "native", "tune_seconds": TUNE_SECONDS}
    begun = time.process_time()
    compiled = engine.compile(model, given[1], 1, **how)
    report = compiled.report
    say(
        {
            "chosen": report.chosen,
            "compile_seconds": round(report.seconds, 2),
            "compile_cpu_seconds": round(time.process_time() - begun, 2),
            "measuring_seconds": round(report.measuring_seconds, 2),
        }
    )
    engines = dict.fromkeys(BATCHES, compiled)
    if compiled.batch is not None:  # its graph fixes the batch size
        engines[4] = engine.compile(model, given[4], 1, **how)
        say({"note": "compiled for each batch size: its graph fixes it"})
    for batch, run in engines.items():
        found = compare(model, run, given[batch])
        say({f"{name}_{batch}": f"{value:.1e}" for name, value in found.items()})
    if about["rounds"]:
        say({"native": round(native_share(compiled, given[1]), 3)})
        say(kept(compiled, given[1]))
        ort = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                with torch.no_grad():
                    ort = onnxruntime(model, given[1], Path(folder))
            except Exception as error:  # whatever the exporter and onnxruntime say
                first = (str(error).strip().splitlines() or [""])[0]
                say({"ort_note": f"{type(error).__name__}: {first:.120}"})
        for batch, run in engines.items():
            with torch.no_grad():
                times = time_in_turn(model, run, given[batch], about["rounds"], ort if batch == 1 else None)
            say({f"{name}_{batch}": f"{value:.4g}" for name, value in times.items()})


def main() -> None:
    about = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {about["core"]})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer

    def say(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        measure(about, say)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        say({"note": f"{type(error).__name__}: {first}", "failed": True})
        raise


if __name__ == "__main__":
    main()
