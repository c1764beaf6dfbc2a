"""The same network in other runtimes, those that are installed, beside the engine: for ``rarefy bench engine --peers``.

All run in this process on one thread, turn by turn, by the processor time of the process. ``benchmarks/engine.py`` is
the careful comparison, with a process for each.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from rarefy.engine.engine import Engine
from rarefy.onnx_files import save_onnx

_Run = Callable[[], Any]


def _onnxruntime(path: Path, x: Tensor) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"input": x.numpy()}
    return lambda: session.run(None, given)


def _openvino(path: Path, x: Tensor) -> _Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy()))
    run: _Run = request.infer
    return run


_PEERS: dict[str, Callable[[Path, Tensor], _Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def installed() -> list[str]:
    """The runtimes that are there."""
    return [name for name in _PEERS if importlib.util.find_spec(name) is not None]


def race(model: nn.Module, engine: Engine, x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of the engine ("rarefy") and of each runtime that is installed, on ``x``.

    Raises ImportError where what exports to ONNX is not installed, ValueError where no other runtime is.
    """
    names = installed()
    if not names:
        raise ValueError(f"none of {', '.join(_PEERS)} is installed: pip install one to compare with")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, x, path)
        runs: dict[str, _Run] = {"rarefy": lambda: engine(x), **{name: _PEERS[name](path, x) for name in names}}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                begun = time.process_time()
                run()
                times[name].append(time.process_time() - begun)
    return {name: median(each[1:]) for name, each in times.items()}
