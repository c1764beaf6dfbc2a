"""Networks trained, or pruned without training, to milliseconds: what was asked, what the table says, what is measured.

    python benchmarks/latency.py            # some minutes; --only resnet20 for one network
    python benchmarks/latency.py --print    # the table of the docs

A network's table of latencies is measured once (rarefy.engine.latency). Then it is brought to 40 and 60 % of the way
from its least to its dense latency: ResNet-20 by AutoSparse on a slice of Fashion-MNIST, MobileNetV1 and ResNet-50 by
the largest weights, as they are initialised. The finished network is compiled, and timed on one thread by its processor
time: `measured_ms`. Then the table is measured again, the finished network in turn with what that is made of: where
others use the machine, it may have become slower or faster in the meantime, which `off` has in it and `off_then` has
not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import results
from rarefy import engine, models, sparse
from rarefy.data import fashion_mnist
from rarefy.engine import by_density
from rarefy.engine.arguments import checked
from rarefy.engine.preparing import prepare
from rarefy.engine.quantize import BUDGET
from rarefy.latency import Latency
from rarefy.train.batches import normalise

SHARES = (0.4, 0.6)
TUNE_SECONDS = 4.0
TIMES, PAUSE = 15, 0.3
IMAGES, BATCH, EPOCHS = 4000, 128, 2


def resnet20() -> nn.Module:
    """Make the network for Fashion-MNIST."""
    return models.resnet20(in_channels=1)


def trained(model: nn.Module, milliseconds: float, table: Latency) -> None:
    """Train it by AutoSparse for a short while."""
    data = fashion_mnist.load(None)
    images, labels = normalise(data.train_images[:IMAGES]), data.train_labels[:IMAGES].long()
    steps = EPOCHS * (IMAGES // BATCH)
    sparsifier = sparse.AutoSparse(model, target_ms=milliseconds, latency=table, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sparsifier.attach(optimizer)
    for step in range(steps):
        chosen = torch.randint(IMAGES, (BATCH,))
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model.train()(images[chosen]), labels[chosen]))
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.step()
    sparsifier.finalize()


def pruned(model: nn.Module, milliseconds: float, table: Latency) -> None:
    """Keep the largest weights, in the distribution of ERK; the first layer and depthwise ones stay whole."""
    whole = [name for name, _ in model.named_modules() if name == "conv1" or name.endswith("depthwise")]
    sparsifier = sparse.Static(
        model, target_ms=milliseconds, latency=table, total_steps=10, masks="magnitude", exclude=whole
    )
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.finalize()


#: The network, what it is called with, and how it is brought to its milliseconds.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module, float, Latency], None]]] = {
    "resnet20": (resnet20, (1, 1, 28, 28), trained),
    "mobilenet_v1": (models.mobilenet_v1, (1, 3, 224, 224), pruned),
    "resnet50": (models.resnet50, (1, 3, 224, 224), pruned),
}


def spread(compiled: engine.Engine, x: Tensor) -> float:
    """Seconds of a call, the median of some times over some seconds: what others do on the machine comes and goes."""
    found = []
    for _ in range(TIMES):
        found.append(compiled.seconds(x))
        time.sleep(PAUSE)
    return median(found)


def beside(model: nn.Module, x: Tensor, compiled: engine.Engine) -> tuple[Latency, float]:
    """The table measured again, and the seconds of an engine that takes turns with those that it is made of."""
    plan = prepare(*checked(model, x, 1, "float32", "measure", 0.0), "float32", None, BUDGET).better
    engines, sizes = by_density.at_densities(plan, (x,), "float32", (1, 1), TUNE_SECONDS), by_density.weights_of(plan)
    layers, calls = by_density.timed([*engines, compiled], (x,), list(sizes))
    return by_density.table(sizes, layers[:, :-1], calls[:-1], "float32", (1, 1), {}), float(calls[-1])


def rows(name: str) -> list[dict[str, Any]]:
    """Measure the table, and one row for each share of its range."""
    build, shape, bring = CASES[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    table = engine.latency(model, x, tune_seconds=TUNE_SECONDS)
    least = table.seconds({layer.name: max(1, layer.weights // 200) for layer in table.layers})
    found = []
    for share in SHARES:
        torch.manual_seed(0)
        model, asked = build(), 1e3 * (least + share * (table.seconds() - least))
        bring(model, asked, table)
        model.eval()
        live = {layer.name: int(model.get_parameter(f"{layer.name}.weight").count_nonzero()) for layer in table.layers}
        compiled = engine.compile(model, x, threads=1)
        alone = 1e3 * spread(compiled, x)
        again, measured = beside(model, x, compiled)
        found.append(
            {
                "network": name,
                "by": "AutoSparse" if bring is trained else "one shot",
                "range_share": share,
                "least_ms": round(1e3 * least, 4),
                "dense_ms": round(1e3 * table.seconds(), 4),
                "asked_ms": round(asked, 4),
                "table_ms": round(1e3 * table.seconds(live), 4),
                "measured_ms": round(alone, 4),
                "table_then_ms": round(1e3 * again.seconds(live), 4),
                "measured_then_ms": round(1e3 * measured, 4),
                "off": round(alone / asked - 1, 4),
                "off_then": round(measured / again.seconds(live) - 1, 4),
                "sparsity": round(1 - sum(live.values()) / sum(layer.weights for layer in table.layers), 4),
                "chosen": compiled.report.chosen,
                **results.provenance(),
            }
        )
        print({key: found[-1][key] for key in list(found[-1])[:14]}, flush=True)
    return found


def markdown() -> str:
    """The table of the docs."""
    lines = [
        "| network | sparse by | zeros | range, ms | asked | by the table | measured | off | off, taking turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results.read("latency"):
        between = f"{float(row['least_ms']):.2f} to {float(row['dense_ms']):.2f}"
        times = " | ".join(f"{float(row[key]):.3f}" for key in ("asked_ms", "table_ms", "measured_ms"))
        off, then = (f"{100 * float(row[key]):+.1f} %" for key in ("off", "off_then"))
        zeros = f"{100 * float(row['sparsity']):.1f} %"
        lines.append(f"| {row['network']} | {row['by']} | {zeros} | {between} | {times} | {off} | {then} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one network; the rows of the others stay")
    parser.add_argument("--print", action="store_true", help="the table of the docs, from what was measured")
    arguments = parser.parse_args()
    if not arguments.print:
        torch.set_num_threads(1)
        names = list(CASES) if arguments.only is None else [arguments.only]
        kept: list[Any] = [row for row in results.read("latency") if row["network"] not in names]
        new = [row for name in names for row in rows(name)]
        order = list(CASES)
        print(results.write("latency", sorted([*kept, *new], key=lambda row: order.index(row["network"]))))
    print(markdown())


if __name__ == "__main__":
    main()
