"""One runtime with one network in a process of its own, which times runs when it is asked to; for benchmarks/engine.py.

    python engine_worker.py '{"runtime": "onnxruntime", "model": "resnet50-90.onnx", "input": "input.npy", ...}'

Reads a request a line from standard input, answers in JSON on standard output: ``run K`` gives the milliseconds of K
runs, CPU time of the process and time on the clock; ``output FILE`` stores what the network answers. It needs NumPy
and its runtime only, so that each runtime may live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[], Any]
#: What runs the network, the runtime's version, and what else it tells.
Made = tuple[Run, str, dict[str, Any]]


def onnxruntime(about: dict[str, Any], x: Any) -> Made:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = about["threads"], 1
    session = ort.InferenceSession(about["model"], options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": x})[0], ort.__version__, {}


def openvino(about: dict[str, Any], x: Any) -> Made:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(about["model"])
    model.reshape(list(x.shape))
    options = {
        "INFERENCE_NUM_THREADS": about["threads"],
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if about["precision"] == "bfloat16" else "f32",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return run, ov.__version__.split("-")[0], {}


def deepsparse(about: dict[str, Any], x: Any) -> Made:
    import deepsparse as ds

    engine = ds.compile_model(
        about["model"], batch_size=len(x), num_cores=about["threads"], num_streams=1, scheduler="single_stream"
    )
    return lambda: engine.run([x])[0], ds.__version__, {}


def torch_compile(about: dict[str, Any], x: Any) -> Made:
    import torch
    from torch._inductor import config

    import engine_models

    torch.set_num_threads(about["threads"])
    config.freezing = True
    model, given = engine_models.build(about["model"]), torch.from_numpy(x)
    if given.dim() == 4:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = given.to(memory_format=torch.channels_last)
    compiled: Callable[..., Any] = torch.compile(model)

    def run() -> Any:
        with torch.inference_mode():
            return compiled(given).numpy()

    return run, torch.__version__, {}


def rarefy(about: dict[str, Any], x: Any) -> Made:
    import torch

    import engine_models
    from rarefy import __version__, engine

    torch.set_num_threads(about["threads"])
    given = torch.from_numpy(x)
    model = engine_models.build(about["model"])
    began = time.process_time()
    # random weights make more of a rounding than trained ones do: all layers in int8, as the peers have them
    int8: dict[str, Any] = (
        {"calibration": [engine_models.inputs(8, about["model"])], "error_budget": 1.0}
        if about["precision"] == "int8"
        else {}
    )
    compiled = engine.compile(model, given, about["threads"], precision=about["precision"], **int8)
    report = compiled.report
    told = {
        "compile_seconds": report.seconds,
        "compile_cpu_seconds": time.process_time() - began,
        "measuring_seconds": report.measuring_seconds,
        "weight_bytes": report.weight_bytes,
        "scratch_bytes": report.scratch_bytes,
        "chosen": report.chosen,
    }
    return lambda: compiled(given).numpy(), __version__, told


RUNTIMES = {
    "rarefy": rarefy,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "deepsparse": deepsparse,
    "torch.compile": torch_compile,
}


def main() -> None:
    about = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, about["cores"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print is no answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    import numpy as np

    run, version, told = RUNTIMES[about["runtime"]](about, np.load(about["input"]))
    for _ in range(2):
        run()
    answer({"version": version, **told})
    for line in sys.stdin:
        kind, argument = line.split()
        if kind == "output":
            np.save(argument, np.array(run()))
            answer({})
        else:
            times: dict[str, list[float]] = {"cpu": [], "wall": []}
            for _ in range(int(argument)):
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                times["cpu"].append((time.process_time() - cpu) * 1e3)
                times["wall"].append((time.perf_counter() - wall) * 1e3)
            answer(times)


if __name__ == "__main__":
    main()
