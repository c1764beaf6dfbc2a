"""A runtime for sparse networks on the CPU: ``engine.compile(model, example_input)`` gives an :class:`Engine`.

The model goes through ``torch.export`` into a plan (:mod:`rarefy.engine.plan`); what native kernels can run of it
becomes native programs, the rest runs in PyTorch; which kernel computes a layer is chosen by measuring. A zero weight
is skipped where a sparse kernel computes a layer: zero times infinity or NaN is zero there.
"""

from rarefy.engine.by_density import latency
from rarefy.engine.compiler import compile
from rarefy.engine.engine import Engine, Port, Report
from rarefy.engine.file import load, save
from rarefy.engine.measure import LayerFacts
from rarefy.engine.profile import Profile, Row
from rarefy.engine.quantization import Quantization, QuantizedLayer
from rarefy.engine.shapes import Engines
from rarefy.engine.steps import StepInfo
from rarefy.engine.tracing import CaptureError
from rarefy.engine.verify import EngineError
from rarefy.latency import Latency, LayerLatency

__all__ = [
    "CaptureError",
    "Engine",
    "EngineError",
    "Engines",
    "Latency",
    "LayerFacts",
    "LayerLatency",
    "Port",
    "Profile",
    "Quantization",
    "QuantizedLayer",
    "Report",
    "Row",
    "StepInfo",
    "compile",
    "latency",
    "load",
    "save",
]
