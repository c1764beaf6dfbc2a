"""Activation functions on a GPU: the memory's speed that each reaches, beside PyTorch's own function and a copy.

    python benchmarks/act_gpu.py [--elements 268435456] [--rounds 15]
    python benchmarks/act_gpu.py --print      # the tables of docs/results/activations.md

Forward, and forward and backward, of every function and mode in bfloat16, and of the mode "exact" in the other formats;
eager, replayed from a CUDA graph, and, forward in the mode "exact" of bfloat16 and float32, compiled; gated units
against PyTorch's function and a product. In each round every way of one row runs in turn. GB/s are the bytes that have
to move by the median time on the GPU, the host ahead of it. ``host_us`` is what an eager call of 1,024 elements costs
the host. LSTM and GRU stand against torch.nn's, by cuDNN, in milliseconds. It is made to take some two minutes, and
writes results/act-gpu.csv and results/act-gpu-lstm.csv.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import results
from rarefy import act
from rarefy.act.kernels.aten import FORMAT_OF
from rarefy.act.spec import reference

Call = Callable[..., Any]

FUNCTIONS: dict[str, tuple[Call, Call]] = {
    "tanh": (act.tanh, torch.tanh),
    "sigmoid": (act.sigmoid, torch.sigmoid),
    "silu": (act.silu, F.silu),
    "gelu": (act.gelu, F.gelu),
    "gelu_tanh": (functools.partial(act.gelu, approximate="tanh"), functools.partial(F.gelu, approximate="tanh")),
    "quick_gelu": (act.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x)),
    "mish": (act.mish, F.mish),
    "softplus": (act.softplus, F.softplus),
    "hardswish": (act.hardswish, F.hardswish),
    "elu": (act.elu, F.elu),
    "exp": (act.exp, torch.exp),
}
#: Cycles for which the GPU waits before it is timed, so that the host has sent all by then.
AHEAD = 400_000
MOST_USED = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh")
COMPILED = ("silu", "gelu", "gelu_tanh")
UNITS: dict[str, tuple[Call, Call]] = {
    "silu_and_mul": (act.silu_and_mul, F.silu),
    "gelu_and_mul": (act.gelu_and_mul, F.gelu),
    "gelu_tanh_and_mul": (act.gelu_tanh_and_mul, functools.partial(F.gelu, approximate="tanh")),
}


def microseconds(ways: Sequence[Call], rounds: int) -> list[float]:
    """The median time of each way on the GPU, in rounds in which all run in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(rounds):
        for way, found in zip(ways, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
            begin.record()
            way()
            end.record()
            end.synchronize()
            found.append(1e3 * begin.elapsed_time(end))
    return [statistics.median(found) for found in times]


def host(way: Call) -> float:
    """What a call costs the host, in microseconds, while the GPU keeps up."""
    best = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            way()
        best.append((time.perf_counter() - start) * 5e3)
    return statistics.median(best)


def captured(way: Call) -> Call:
    """The same as a replay of a CUDA graph."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd remembers the stream
        way()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph.replay


def compare(function: str, mode: str, x: Tensor, ours: Call, theirs: Call | None, rounds: int) -> list[dict[str, Any]]:
    """The rows of one function: forward alone, then with the gradient."""
    torch._dynamo.reset()
    leaf, upstream, target = x.clone().requires_grad_(), torch.ones_like(x), torch.empty_like(x)

    def trained(call: Call) -> Call:
        return lambda: torch.autograd.grad(call(leaf), leaf, upstream)

    small = x[:1024].clone()
    rows = []
    compiled = mode == "exact" and x.dtype in (torch.bfloat16, torch.float32) and function in COMPILED
    for what, wrap, arrays in (("forward", lambda call: lambda: call(x), 2), ("forward and backward", trained, 5)):
        ways = {"copy": lambda: target.copy_(x), "eager": wrap(ours)}
        ways["graph"] = captured(ways["eager"])
        if theirs is not None:
            ways["torch"] = wrap(theirs)
        if compiled and theirs is not None and what == "forward":
            ways |= {"compiled": wrap(torch.compile(ours)), "torch_compiled": wrap(torch.compile(theirs))}
        taken = dict(zip(ways, microseconds(list(ways.values()), rounds), strict=True))
        # a copy moves two arrays; forward and backward read x twice, upstream once, and write two
        moved = {way: (2 if way == "copy" else arrays) * x.nbytes for way in ways}
        speeds = {f"{way}_gbs": round(moved[way] / us / 1e3, 1) for way, us in taken.items()}
        rows.append({"function": function, "mode": mode, "format": FORMAT_OF[x.dtype].name, "what": what, **speeds})
    rows[0]["host_us"] = round(host(lambda: ours(small)), 2)
    if theirs is not None:
        rows[0]["torch_host_us"] = round(host(lambda: theirs(small)), 2)
    return rows


def units(name: str, dtype: torch.dtype, elements: int, rounds: int) -> dict[str, Any]:
    """The row of one gated unit, forward: three arrays move."""
    torch._dynamo.reset()
    ours, theirs = UNITS[name]
    x = torch.randn(elements // 8192, 16384, device="cuda").to(dtype)

    def composed(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        product: Tensor = theirs(gate) * up
        return product

    half = x[:, :8192].contiguous()
    ways: dict[str, Call] = {"copy": lambda: torch.empty_like(half).copy_(half), "eager": lambda: ours(x)}
    ways["graph"] = captured(ways["eager"])
    if dtype == torch.bfloat16:
        for way, call in (("compiled", ours), ("torch_compiled", composed)):
            ways[way] = functools.partial(torch.compile(call), x)
    ways["torch"] = lambda: composed(x)
    taken = dict(zip(ways, microseconds(list(ways.values()), rounds), strict=True))
    speeds = {f"{way}_gbs": round((2 if way == "copy" else 3) * half.nbytes / us / 1e3, 1) for way, us in taken.items()}
    return {"function": name, "mode": "exact", "format": FORMAT_OF[dtype].name, "what": "forward", **speeds}


#: input and hidden size, batch, steps
RECURRENT = {"large": (1024, 128, 32), "small": (256, 32, 32)}


def inferred(layer: Any, x: Tensor) -> Any:
    """Forward alone."""
    with torch.no_grad():
        return layer(x)


def trained(layer: Any, x: Tensor) -> Any:
    """Forward, and the gradients of the input and of all weights."""
    return torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])


def recurrent(kind: str, size: str, dtype: torch.dtype, mode: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one layer: ours and PyTorch's, eager and replayed."""
    width, batch, steps = RECURRENT[size]
    layers = {
        "": getattr(act, kind)(width, width, mode=mode, device="cuda", dtype=dtype),
        "torch_": getattr(torch.nn, kind)(width, width, device="cuda", dtype=dtype),
    }
    x = torch.randn(steps, batch, width, device="cuda", dtype=dtype).requires_grad_()
    rows = []
    for what in ("forward", "forward and backward"):
        ways: dict[str, Call] = {}
        for name, layer in layers.items():
            call = functools.partial(inferred if what == "forward" else trained, layer, x)
            ways[f"{name}ms"] = call
            ways[f"{name}graph_ms"] = captured(call)
        taken = zip(ways, microseconds(list(ways.values()), rounds), strict=True)
        name = str(dtype).removeprefix("torch.")
        row = {"kind": kind, "width": width, "batch": batch, "steps": steps, "mode": mode, "dtype": name, "what": what}
        rows.append({**row, **{way: round(us / 1e3, 3) for way, us in taken}})
    return rows


COLUMNS = [
    *("function", "mode", "format", "what", "copy_gbs", "eager_gbs", "graph_gbs", "compiled_gbs", "torch_gbs"),
    *("torch_compiled_gbs", "host_us", "torch_host_us"),
]


def markdown(lines: list[list[str]]) -> str:
    """Return rows of cells, the head first, as a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def tables() -> str:
    """Return what was measured as shares of a copy's speed, and of cuDNN's time."""
    lines = [["", "format", "mode", "forward", "PyTorch's", "with gradient", "PyTorch's", "host, µs", "PyTorch's"]]
    both: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in results.read("act-gpu"):
        both.setdefault((row["function"], row["format"], row["mode"]), {})[row["what"]] = row

    def share(row: dict[str, str], way: str) -> str:
        return f"{float(row[way]) / float(row['copy_gbs']):.2f}" if row.get(way) else ""

    for (function, form, mode), found in both.items():
        ahead, back = found["forward"], found.get("forward and backward", {})
        cells = [
            share(ahead, "eager_gbs"),
            share(ahead, "torch_gbs"),
            share(back, "graph_gbs"),
            share(back, "torch_gbs"),
        ]
        hosts = [f"{float(ahead[key]):.0f}" if ahead[key] else "" for key in ("host_us", "torch_host_us")]
        lines.append([f"`{function}`", form, mode, *cells, *hosts])
    layers = [["", "dtype", "mode", "what", "eager", "cuDNN", "graph", "cuDNN"]]
    for row in results.read("act-gpu-lstm"):
        name = f"{row['kind']}, {row['width']} wide, batch {row['batch']}, {row['steps']} steps"
        times = [f"{float(row[key]):.2f}" for key in ("ms", "torch_ms", "graph_ms", "torch_graph_ms")]
        layers.append([name, row["dtype"], row["mode"], row["what"], *times])
    return f"{markdown(lines)}\n\n{slower()}\n\n{markdown(layers)}"


def slower() -> str:
    """Return every speed that is below PyTorch's, over PyTorch's."""
    lines = [["slower", "format", "mode", "forward", "compiled", "with gradient", "replayed"]]
    found: dict[tuple[str, ...], list[str]] = {}
    for row in results.read("act-gpu"):
        ahead = row["what"] == "forward"
        ways = [
            ("eager_gbs", "torch_gbs"),
            ("compiled_gbs", "torch_compiled_gbs") if ahead else ("graph_gbs", "torch_gbs"),
        ]
        key = (f"`{row['function']}`", row["format"], row["mode"])
        for at, (ours, theirs) in enumerate(ways, 0 if ahead else 2):
            if row[ours] and row[theirs] and float(row[ours]) < float(row[theirs]):
                found.setdefault(key, [""] * 4)[at] = f"{float(row[ours]) / float(row[theirs]):.3f}"
    return markdown(lines + [[*key, *cells] for key, cells in found.items()])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the input (default: 2^28)")
    parser.add_argument("--rounds", type=int, default=15, help="of which the median is taken (default: 15)")
    parser.add_argument("--print", action="store_true", help="print the tables from the files")
    given = parser.parse_args()
    if given.print:
        print(tables())
        return
    about = {"gpu": torch.cuda.get_device_name(), **results.provenance()}
    layers: list[dict[str, Any]] = []
    for kind in ("LSTM", "GRU"):
        for size in RECURRENT:
            for dtype in (torch.bfloat16, torch.float32):
                for mode in ("exact", "ktanh") if dtype == torch.bfloat16 else ("exact",):
                    layers += recurrent(kind, size, dtype, mode, given.rounds)
                    for row in layers[-2:]:
                        print(*(f"{value:>10}" for value in row.values()), flush=True)
    results.write("act-gpu-lstm", [{**row, **about} for row in layers])
    rows: list[dict[str, Any]] = []
    x = torch.randn(given.elements, device="cuda", dtype=torch.bfloat16)
    cases = [(function, mode, x.dtype) for function in FUNCTIONS for mode in reference.modes(function)]
    cases += [(function, "exact", torch.float32) for function in FUNCTIONS]
    cases += [(function, "exact", dtype) for dtype in (torch.float16, torch.float8_e4m3fn) for function in MOST_USED]
    for function, mode, dtype in cases:
        ours, theirs = FUNCTIONS[function]
        native = None if dtype.itemsize == 1 else theirs  # PyTorch has none for 8 bits
        rows += compare(function, mode, x.to(dtype), functools.partial(ours, mode=mode), native, given.rounds)
        for row in rows[-2:]:
            print(*(f"{value:>10}" for value in row.values()), flush=True)
    del x
    for name in UNITS:
        for dtype in (torch.bfloat16, torch.float32):
            rows.append(units(name, dtype, given.elements // 2, given.rounds))
            print(*(f"{value:>10}" for value in rows[-1].values()), flush=True)
    results.write("act-gpu", [{**{column: row.get(column, "") for column in COLUMNS}, **about} for row in rows])


if __name__ == "__main__":
    main()
