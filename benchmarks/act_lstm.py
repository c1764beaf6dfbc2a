"""LSTM and GRU on the CPU against torch.nn's and against a cell stepped in Python; writes results/act-lstm.csv.

    python benchmarks/act_lstm.py --kind LSTM --size large --threads 1    # a part: its rows of the file are replaced
    python benchmarks/act_lstm.py --print                     # the table of docs/results/activations.md

All entries of a part run in turns, short ones several times a turn; the median of the turns counts. A token is one
step of one sequence. Training is forward, backward and the gradients of the input and of all weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import results
from rarefy import act

#: input and hidden size, layers, steps, batch
SIZES = {"large": (512, 2, 32, 64), "small": (64, 1, 32, 4), "stream": (128, 1, 32, 1)}
SLOWEST = 3.0  # seconds of a call above which an entry runs once
TURN = 0.02  # seconds of a turn at least
NAME = "act-lstm"
MODES = ("exact", "ktanh", "hard")


class Stepped(nn.Module):
    """The layers of a network as cells in a Python loop over the steps, made of functions of rarefy.act."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Take [steps, batch, input] and return the output, as the modules do."""
        lstm = self.layers.mode == "LSTM"
        for layer in range(self.layers.num_layers):
            w_ih, w_hh, b_ih, b_hh = (
                getattr(self.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = x.new_zeros(x.shape[1], self.layers.hidden_size)
            outputs = []
            for at in x:
                p, q = nn.functional.linear(at, w_ih, b_ih), nn.functional.linear(h, w_hh, b_hh)
                if lstm:
                    i, f, g, o = (p + q).chunk(4, 1)
                    c = act.sigmoid(f) * c + act.sigmoid(i) * act.tanh(g)
                    h = act.sigmoid(o) * act.tanh(c)
                else:
                    (r, z, n), (u, v, m) = p.chunk(3, 1), q.chunk(3, 1)
                    n = act.tanh(n + act.sigmoid(r + u) * m)
                    h = (h - n) * act.sigmoid(z + v) + n
                outputs.append(h)
            x = torch.stack(outputs)
        return x, None


def training(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One step of training without the optimizer."""
    inputs = [x.requires_grad_(), *model.parameters()]
    return lambda: torch.autograd.grad(model(x)[0].sum(), inputs)


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward without gradients."""

    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def entries(kind: str, size: str) -> dict[tuple[str, str, str], Callable[[], object]]:
    """Every call of a part by (phase, dtype, what computes)."""
    hidden, layers, steps, batch = SIZES[size]
    found: dict[tuple[str, str, str], Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        modes = MODES[:1] if size == "large" else MODES
        ours = {mode: getattr(act, kind)(hidden, hidden, layers, mode=mode, dtype=dtype) for mode in modes}
        models: dict[str, nn.Module] = {f"rarefy {mode}": model for mode, model in ours.items()}
        models["torch.nn"] = getattr(nn, kind)(hidden, hidden, layers, dtype=dtype)
        models["stepped"] = Stepped(ours["exact"])
        for label, model in models.items():
            x = torch.randn(steps, batch, hidden, dtype=dtype)
            found["training", name, label] = training(model, x)
            found["inference", name, label] = inference(model, x.detach())
    return found


def measure(
    calls: dict[tuple[str, str, str], Callable[[], object]], seconds: float
) -> dict[tuple[str, str, str], float]:
    """Median seconds of each call, all in turns for so long; one that is very slow runs once."""
    times: dict[tuple[str, str, str], list[float]] = {}
    often: dict[tuple[str, str, str], int] = {}
    for key, call in calls.items():  # the first call of each warms it up, and may make tables
        took = math.inf
        for _ in range(2):
            begin = time.perf_counter()
            call()
            took = min(took, time.perf_counter() - begin)
            if took > SLOWEST:
                break
        times[key] = [took] if took > SLOWEST else []
        if took <= SLOWEST:
            often[key] = max(1, round(TURN / took))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(times[key]) < 3 for key in often):
        for key, count in often.items():
            begin = time.perf_counter()
            for _ in range(count):
                calls[key]()
            times[key].append((time.perf_counter() - begin) / count)
    return {key: statistics.median(some) for key, some in times.items()}


def run(kind: str, size: str, threads: int, seconds: float) -> None:
    """Measure a part and put its rows in the place of those before."""
    torch.set_num_threads(threads)
    _, _, steps, batch = SIZES[size]
    part = {"size": size, "threads": str(threads), "kind": kind}
    rows: list[Any] = [row for row in results.read(NAME) if any(row[key] != part[key] for key in part)]
    about = results.provenance()
    about.pop("threads")
    for (phase, dtype, label), median in measure(entries(kind, size), seconds).items():
        rate = steps * batch / median
        row = {**part, "phase": phase, "dtype": dtype, "entry": label}
        rows.append({**row, "ms": f"{median * 1e3:.4g}", "tokens_per_s": f"{rate:.4g}", **about})
        print(*row.values(), f"{median * 1e3:.4g} ms")
    rows.sort(key=lambda row: (list(SIZES).index(row["size"]), row["kind"] == "GRU", row["threads"]))
    results.write(NAME, rows)


def table() -> str:
    """Return the thousands of tokens a second of every part, in Markdown."""
    rows = results.read(NAME)
    rates = {tuple(row[k] for k in ("size", "threads", "kind", "phase", "dtype", "entry")): row for row in rows}
    head = ["", "threads", "phase", "bf16", "float32", "nn, bf16", "nn, float32", "over the better nn", "over steps"]
    lines = [head, ["---"] * len(head)]
    for size, threads, kind, phase in dict.fromkeys(key[:4] for key in rates):

        def rate(dtype: str, entry: str, part: tuple[str, ...] = (size, threads, kind, phase)) -> float:
            return float(rates[(*part, dtype, entry)]["tokens_per_s"]) / 1e3

        ours, wide = rate("bfloat16", "rarefy exact"), rate("float32", "rarefy exact")
        theirs = [rate(dtype, "torch.nn") for dtype in ("bfloat16", "float32")]
        stepped = max(rate(dtype, "stepped") for dtype in ("bfloat16", "float32"))
        hidden, layers, steps, batch = SIZES[size]
        name = f"{kind}, {layers} x {hidden}, batch {batch}, {steps} steps"
        figures = [f"{x:.3g}" for x in (ours, wide, *theirs)]
        lines += [[name, threads, phase, *figures, f"{ours / max(theirs):.2f}", f"{ours / stepped:.1f}"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run a part, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("LSTM", "GRU"), default="LSTM")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring")
    parser.add_argument("--print", action="store_true", help="print the table from the file")
    options = parser.parse_args()
    if options.print:
        print(table())
    else:
        run(options.kind, options.size, options.threads, options.seconds)


if __name__ == "__main__":
    main()
