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
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
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
    """How far the engine and PyTorch are from each other, and both from PyTorch in float64."""
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        eager, exact = model(*inputs), copy.deepcopy(model).double()(*double)
    found = run(*inputs)
    return {
        "error": difference(found, eager),
        "engine64": difference(found, exact),
        "eager64": difference(eager, exact),
    }


def seconds(run: Run, inputs: tuple[Tensor, ...], calls: int) -> float:
    """CPU time of a call: the mean of so many."""
    begun = time.thread_time()
    for _ in range(calls):
        run(*inputs)
    return (time.thread_time() - begun) / calls


def time_in_turn(eager: Run, run: Run, inputs: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """Medians over the rounds of milliseconds a call, and of eager's time through the engine's in the same round."""
    calls = []
    for each in (eager, run):
        seconds(each, inputs, 1)
        calls.append(1 + int(LEAST / max(seconds(each, inputs, 1), 1e-6)))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for i in (turn % 2, 1 - turn % 2):
            each = (eager, run)[i]
            if calls[i] > 1:
                each(*inputs)  # the other has driven its weights from the caches
            times[i].append(seconds(each, inputs, calls[i]))
    ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
    middle = [1e3 * statistics.median(each) for each in times]
    return {"eager_ms": middle[0], "engine_ms": middle[1], "speedup": statistics.median(ratios)}


def macs_left(model: nn.Module, inputs: tuple[Tensor, ...]) -> float | str:
    """Multiply-accumulates with nonzero weights, as a share of all; nothing where they cannot be counted."""
    try:
        return round(cost.count(model, inputs).ratio, 4)
    except ValueError:
        return ""


def native_share(compiled: engine.Engine, inputs: Sequence[Tensor]) -> float:
    """Share of the time that is spent in native steps."""
    return sum(row.share for row in compiled.profile(*inputs, rounds=3).rows if row.kernel not in ("PyTorch", "oneDNN"))


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
        for batch, run in engines.items():
            with torch.no_grad():
                times = time_in_turn(model, run, given[batch], about["rounds"])
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
