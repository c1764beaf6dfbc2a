"""Training steps with sparse weights on one thread: every product of a layer, and whole networks, against PyTorch.

    python benchmarks/sparse_steps.py layers              # each of these measures, into results/sparse-steps.csv
    python benchmarks/sparse_steps.py resnet50 DENSITY
    python benchmarks/sparse_steps.py mlp DENSITY
    python benchmarks/sparse_steps.py tables              # prints what docs/results/sparse-steps.md says

Everything is channels_last, float32, random masks of one density in all layers. Dense and sparse alternate in one run;
milliseconds are medians of the process's CPU time. "Dense" is PyTorch's best: of a 1x1 convolution and of a linear
layer the faster of the convolution and the matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import results
from rarefy import sparse
from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Index, Shape
from rarefy.models import resnet50

NAME = "sparse-steps"
DENSITIES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SECONDS = 38.0
PRODUCTS = ("output", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Case:
    """A layer: batch, channels in and out, height and width of the input, kernel and stride."""

    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1

    @property
    def name(self) -> str:
        """In words."""
        if self.size == 1:
            return f"linear {self.inputs} to {self.outputs}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride}, {self.inputs} to {self.outputs}, {self.size}x{self.size}"


CASES = (
    Case(256, 1024, 1024, 1),
    Case(128, 1024, 4096, 1),
    Case(4, 64, 256, 56),
    Case(4, 256, 64, 56),
    Case(4, 512, 128, 28),
    Case(4, 256, 1024, 14),
    Case(4, 2048, 512, 7),
    Case(4, 256, 512, 56, stride=2),
    Case(2, 64, 64, 56, 3),
    Case(2, 128, 128, 28, 3),
    Case(4, 256, 256, 14, 3),
    Case(4, 512, 512, 7, 3),
    Case(2, 128, 128, 56, 3, 2),
)


def medians(functions: Sequence[Callable[[], object]], seconds: float, rounds: int = 3) -> list[float]:
    """Milliseconds of CPU time of each function, called in turn for so long, but at least so often."""
    for function in functions:
        function()
    taken: list[list[float]] = [[] for _ in functions]
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(taken[0]) < rounds:
        for function, times in zip(functions, taken, strict=True):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
    return [1e3 * statistics.median(times) for times in taken]


def dense_products(case: Case, x: Tensor, weight: Tensor, g: Tensor) -> list[list[Callable[[], object]]]:
    """PyTorch's functions for each product."""
    padding = case.kernel // 2

    def backward(which: tuple[bool, bool, bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            g, x, weight, None, [case.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, which
        )

    found: list[list[Callable[[], object]]] = [
        [lambda: F.conv2d(x, weight, None, case.stride, padding)],
        [backward((True, False, False))],
        [backward((False, True, False))],
    ]
    if case.kernel == case.stride == 1:
        rows, of_rows, matrix = by_rows(x), by_rows(g), weight.flatten(1)
        found[0].append(lambda: F.linear(rows, matrix))
        found[1].append(lambda: of_rows @ matrix)
        found[2].append(lambda: of_rows.t() @ rows)
    return found


def by_rows(tensor: Tensor) -> Tensor:
    """All positions of a channels_last tensor, (positions, channels)."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def sparse_products(case: Case, x: Tensor, weight: Tensor, g: Tensor) -> list[Callable[[], object]]:
    """Our functions for each product; the first takes the values from the weight, as a forward pass does."""
    padding, flat = case.kernel // 2, case.kernel == case.stride == 1
    size = 1 if flat else case.size
    shape = Shape(
        *(case.outputs, case.inputs, size, size),
        *((case.kernel,) * 2, (case.stride,) * 2, (padding,) * 2),
        flat=flat,
    )
    places = sparse_layers.live_places(weight)
    index = Index(sparse_layers.grid(shape), places, True)
    values, _, _ = sparse_layers.take(weight, places)

    def form(tensor: Tensor) -> Tensor:
        return by_rows(tensor).t()[None, :, None, :] if flat else tensor

    def output() -> None:
        taken, _, _ = sparse_layers.take(weight, places)
        index.forward(form(x), taken, None, form(torch.empty_like(g)))

    def input_gradient() -> None:
        to = torch.empty_like(x) if sparse_layers.grid(shape).all_phases else torch.zeros_like(x)
        index.backward(form(x), values, form(g), form(to), None)

    def weight_gradient() -> None:
        index.backward(form(x), values, form(g), None, torch.empty_like(weight))

    return [output, input_gradient, weight_gradient]


def layers() -> list[dict[str, Any]]:
    """Measure every case at every density."""
    rows = []
    for case in CASES:
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)

        x = make(case.batch, case.inputs, case.size, case.size)
        whole = make(case.outputs, case.inputs, case.kernel, case.kernel)
        g = torch.randn_like(F.conv2d(x, whole, None, case.stride, case.kernel // 2))
        chance = torch.rand(whole.shape, generator=generator)
        dense = dense_products(case, x, whole, g)
        functions = [function for product in dense for function in product]
        for density in DENSITIES:
            functions += sparse_products(case, x, whole * (chance < density), g)
        taken = iter(medians(functions, SECONDS / len(CASES)))
        best = [min(next(taken) for _ in product) for product in dense]
        for density in DENSITIES:
            ours = [next(taken) for _ in PRODUCTS]
            parts = [*zip(PRODUCTS, best, ours, strict=True), ("all", sum(best), sum(ours))]
            rows += [row("layer", case.name, case.batch, density, *part) for part in parts]
    return rows


def network(name: str, density: float) -> list[dict[str, Any]]:
    """Measure whole training steps: forward, backward, the optimizer and the sparsifier."""
    torch.manual_seed(0)
    batch, images = (8, (3, 224, 224)) if name == "resnet50" else (256, (1024,))
    x, labels = torch.randn(batch, *images), torch.randint(1000, (batch,))
    if len(images) == 3:
        x = x.contiguous(memory_format=torch.channels_last)

    def step_of(accelerated: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = resnet50() if name == "resnet50" else mlp()
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        sparsifier = sparse.Static(model, target=1.0 - density, distribution="uniform", total_steps=10_000)
        sparsifier.attach(optimizer)
        if accelerated:
            sparse.accelerate(sparsifier)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    steps = [step_of(False), step_of(True)]
    for step in steps:  # the first of them measure what is faster
        step()
    dense, ours = medians(steps, SECONDS - 20.0 if name == "resnet50" else 20.0)
    return [row("network", name, batch, density, "training step", dense, ours)]


def mlp() -> nn.Module:
    """Three linear layers of 1,024."""
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))


def row(what: str, name: str, batch: int, density: float, product: str, dense: float, ours: float) -> dict[str, Any]:
    """One line of results/sparse-steps.csv."""
    return {
        **{"what": what, "name": name, "batch": batch, "density": density, "product": product},
        **{"dense_ms": round(dense, 3), "sparse_ms": round(ours, 3), "speedup": round(dense / ours, 3)},
        **results.provenance(),
    }


def break_even(rows: Sequence[Mapping[str, str]]) -> str:
    """The density at which a layer's dense and sparse products meet, from the two measured ones beside it."""
    points = sorted((float(r["density"]), float(r["speedup"])) for r in rows)
    if points[-1][1] >= 1.0:
        return f"above {points[-1][0]:g}"
    for (low, fast), (high, slow) in itertools.pairwise(points):
        if fast >= 1.0 > slow:
            return f"{low + (high - low) * (fast - 1.0) / (fast - slow):.2f}"
    return f"below {points[0][0]:g}"


def tables(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The tables of docs/results/sparse-steps.md: whole steps on every processor, then each one's layers."""
    processors = dict.fromkeys(map(results.processor, rows))
    return [
        networks(rows),
        *itertools.chain(*(of_layers([r for r in rows if results.processor(r) == p]) for p in processors)),
    ]


def networks(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of whole steps."""
    lines = [["network", "batch", "sparsity", "processor", "dense", "accelerated", "speedup"]]
    lines.append(["---"] * len(lines[0]))
    for r in (r for r in rows if r["what"] == "network"):
        name = {"resnet50": "ResNet-50, 224x224", "mlp": "MLP, three layers of 1,024"}[r["name"]]
        sparsity = f"{100 * (1 - float(r['density'])):g} %"
        times = (f"{float(r['dense_ms']):.0f} ms", f"{float(r['sparse_ms']):.0f} ms", f"{float(r['speedup']):.2f}")
        lines.append([name, r["batch"], sparsity, results.processor(r), *times])
    return markdown(lines)


def of_layers(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The tables of layers on one processor."""
    shown = (0.5, 0.3, 0.2, 0.1, 0.05)
    head = ["layer", "batch", "dense", *(f"{100 * (1 - d):g} %" for d in shown), "break-even density"]
    lines = [head, ["---"] * len(head)]
    names = list(dict.fromkeys(r["name"] for r in rows if r["what"] == "layer"))
    for name in names:
        mine = [r for r in rows if r["name"] == name and r["product"] == "all"]
        by_density = {float(r["density"]): r for r in mine}
        cells = [f"{float(by_density[d]['speedup']):.2f}" for d in shown]
        lines.append([name, mine[0]["batch"], f"{float(mine[0]['dense_ms']):.1f} ms", *cells, break_even(mine)])
    each = ["layer at 90 %", *PRODUCTS]
    products = [each, ["---"] * len(each)]
    for name in names:
        mine = [r for r in rows if r["name"] == name and float(r["density"]) == 0.1]
        found = {r["product"]: f"{float(r['speedup']):.2f}" for r in mine}
        products.append([name, *(found[product] for product in PRODUCTS)])
    return [markdown(lines), markdown(products)] if names else []


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of these lines."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "resnet50", "mlp", "tables"))
    parser.add_argument("density", type=float, nargs="?", default=0.1, help="of a network's weights")
    arguments = parser.parse_args()
    if arguments.what == "tables":
        print("\n\n".join(tables(results.read(NAME))))
        return
    torch.set_num_threads(1)
    fresh = layers() if arguments.what == "layers" else network(arguments.what, arguments.density)
    keys = ("cpu", "native_isa", "what", "name", "density", "product")
    measured = {tuple(str(r[key]) for key in keys) for r in fresh}
    kept = [r for r in results.read(NAME) if tuple(r[key] for key in keys) not in measured]
    rows: list[Mapping[str, Any]] = [*kept, *fresh]
    rows.sort(key=lambda r: (r["what"] == "layer", r["name"] == "mlp", r["what"] == "network" and -float(r["density"])))
    print(results.write(NAME, rows))
    print("\n\n".join(tables([{k: str(v) for k, v in r.items()} for r in rows])))


if __name__ == "__main__":
    main()
