"""What int8 costs in accuracy and gains in time: a small network on Fashion-MNIST, dense and sparse.

    python benchmarks/int8_accuracy.py [--epochs 2] [--variants dense 90 95 90x4] [--seeds 3]
    python benchmarks/int8_accuracy.py --print

Trains ResNet-20 with AutoSparse to so many percent of zeros ("90x4": in blocks of four inputs; "dense": without it),
the first layer left dense, finalizes it, and compiles it with 256 images of the training set to calibrate with. Rows go
to results/int8-accuracy.csv as they come, and are not measured again: accuracy on the 10,000 test images in both
precisions, on how many of them both give the same answer, what ``report.quantization`` says, and the CPU time of both
engines for one image, run in turn on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine_tables
import results
from rarefy import engine, models, sparse
from rarefy.data import fashion_mnist
from rarefy.train.batches import normalise

BATCH, CALIBRATION = 128, 256
#: The target sparsity and the inputs of a block.
VARIANTS: dict[str, tuple[float, int]] = {"dense": (0.0, 1), "90": (0.9, 1), "95": (0.95, 1), "90x4": (0.9, 4)}
NAMES = {"dense": "dense", "90": "90 % zeros", "95": "95 % zeros", "90x4": "90 % in blocks of four"}


def trained(variant: str, data: fashion_mnist.FashionMNIST, epochs: int, seed: int) -> nn.Module:
    """The network in evaluation mode."""
    torch.manual_seed(seed)
    model = models.resnet20(width=16, in_channels=1, stem_stride=2)
    per_epoch = len(data.train_images) // BATCH
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    target, block = VARIANTS[variant]
    sparsifier = None
    if target:
        options = {"target": target, "total_steps": steps, "block": block, "exclude": ["conv1"]}
        sparsifier = sparse.create("autosparse", model, **options)
        sparsifier.attach(optimizer)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(data.train_images)), BATCH)[:per_epoch]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(normalise(data.train_images[chosen])), data.train_labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    return (model if sparsifier is None else sparsifier.finalize()).eval()


@torch.no_grad()
def answers(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The classes that it gives."""
    return torch.cat([network(some).argmax(1) for some in torch.split(images, 500)])


def times_in_turn(engines: Mapping[str, Callable[[Tensor], Tensor]], image: Tensor) -> dict[str, float]:
    """Milliseconds of CPU time of a run, the median."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(21):
        for name, run in engines.items():
            begun = time.thread_time()
            for _ in range(20):
                run(image)
            if turn:
                found[name].append((time.thread_time() - begun) / 20 * 1e3)
    return {name: statistics.median(each) for name, each in found.items()}


def measured(variant: str, data: fashion_mnist.FashionMNIST, epochs: int, seed: int) -> dict[str, Any]:
    """One row."""
    model = trained(variant, data, epochs, seed)
    weights = torch.cat([each.flatten() for each in model.parameters() if each.dim() > 1])
    chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    batches = torch.split(normalise(data.train_images[chosen]), 64)
    images = normalise(data.test_images)
    exact = engine.compile(model, images[:1], 1)
    compiled = engine.compile(model, images[:1], 1, precision="int8", calibration=batches)
    report = compiled.report.quantization
    assert report is not None
    took = times_in_turn({"float32": exact, "int8": compiled}, images[:1])
    wanted, near = answers(model, images), answers(compiled, images)
    return {
        "variant": variant,
        "seed": seed,
        "epochs": epochs,
        "zeros": f"{float((weights == 0).float().mean()):.4f}",
        "calibration": report.samples,
        "method": report.method,
        "float32": f"{100 * float((wanted == data.test_labels).float().mean()):.2f}",
        "int8": f"{100 * float((near == data.test_labels).float().mean()):.2f}",
        "same_answer": f"{100 * float((near == wanted).float().mean()):.2f}",
        "error": f"{report.error:.4f}",
        "layers_in_float32": sum(layer.kept is not None for layer in report.layers),
        "float32_ms": f"{took['float32']:.3f}",
        "int8_ms": f"{took['int8']:.3f}",
        **results.provenance(),
    }


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Means over the seeds, with standard deviations of the accuracies."""
    lines = []
    for variant, name in NAMES.items():
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            continue
        mean = {
            key: statistics.mean(float(row[key]) for row in own) for key in ("same_answer", "float32_ms", "int8_ms")
        }
        accuracies = [[float(row[key]) for row in own] for key in ("float32", "int8")]
        shown = [f"{statistics.mean(each):.2f} ± {statistics.stdev(each):.2f}" for each in accuracies]
        lost = statistics.mean(a - b for a, b in zip(*accuracies, strict=True))
        same, *ms = (f"{mean['same_answer']:.2f}", f"{mean['float32_ms']:.3f}", f"{mean['int8_ms']:.3f}")
        lines.append([name, str(len(own)), *shown, f"{lost:+.2f}", same, *ms])
    head = ["ResNet-20", "seeds", "float32, %", "int8, %", "lost", "same answer, %", "float32, ms", "int8, ms"]
    return engine_tables.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="print the table of the stored results, measure nothing")
    arguments = parser.parse_args()
    rows = results.read("int8-accuracy")
    if arguments.print:
        print(table(rows))
        return
    torch.set_num_threads(1)
    data = fashion_mnist.load()
    for seed in range(arguments.seeds):
        for variant in arguments.variants:
            if any((row["variant"], row["seed"]) == (variant, str(seed)) for row in rows):
                continue
            about = measured(variant, data, arguments.epochs, seed)
            print(f"{variant}, seed {seed}: float32 {about['float32']} %, {about['float32_ms']} ms, "
                  f"int8 {about['int8']} %, {about['int8_ms']} ms", flush=True)  # fmt: skip
            rows.append({key: str(value) for key, value in about.items()})
            results.write("int8-accuracy", rows)


if __name__ == "__main__":
    main()
