"""What int8 costs in accuracy: small networks on Fashion-MNIST, 90 % zeros, in float32 and in int8 after training.

    python benchmarks/int8_accuracy.py [--epochs 2] [--networks fashion_cnn resnet20] [--seeds 1]

Trains each network sparse by AutoSparse, finalizes it, and compiles it with 256 images of the training set to calibrate
with. Rows go to results/int8-accuracy.csv: accuracy on the 10,000 test images in both precisions, on how many of them
both give the same answer, and what ``report.quantization`` says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import results
from rarefy import engine, models, sparse
from rarefy.data import fashion_mnist
from rarefy.train.batches import normalise

BATCH, CALIBRATION, TARGET = 128, 256, 0.9

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fashion_cnn": models.fashion_cnn,
    "resnet20": lambda: models.resnet20(width=16, in_channels=1, stem_stride=2),
}


def trained(network: str, data: fashion_mnist.FashionMNIST, epochs: int, seed: int) -> nn.Module:
    """The network with 90 % zeros, in evaluation mode."""
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    per_epoch = len(data.train_images) // BATCH
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    sparsifier = sparse.create("autosparse", model, target=TARGET, total_steps=steps)
    sparsifier.attach(optimizer)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(data.train_images)), BATCH)[:per_epoch]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(normalise(data.train_images[chosen])), data.train_labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    return sparsifier.finalize().eval()


@torch.no_grad()
def answers(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([network(some).argmax(1) for some in torch.split(images, 500)])


def measured(network: str, data: fashion_mnist.FashionMNIST, epochs: int, seed: int) -> dict[str, Any]:
    """One row."""
    model = trained(network, data, epochs, seed)
    weights = torch.cat([each.flatten() for each in model.parameters() if each.dim() > 1])
    chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    batches = torch.split(normalise(data.train_images[chosen]), 64)
    images = normalise(data.test_images)
    compiled = engine.compile(model, images[:1], precision="int8", calibration=batches)
    report = compiled.report.quantization
    assert report is not None
    exact, near = answers(model, images), answers(compiled, images)
    return {
        "network": network,
        "seed": seed,
        "epochs": epochs,
        "zeros": f"{float((weights == 0).float().mean()):.4f}",
        "calibration": report.samples,
        "method": report.method,
        "float32": f"{100 * float((exact == data.test_labels).float().mean()):.2f}",
        "int8": f"{100 * float((near == data.test_labels).float().mean()):.2f}",
        "same_answer": f"{100 * float((near == exact).float().mean()):.2f}",
        "error": f"{report.error:.4f}",
        "layers_in_float32": sum(layer.kept is not None for layer in report.layers),
        **results.provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = fashion_mnist.load(), list[dict[str, Any]]()
    for network in arguments.networks:
        for seed in range(arguments.seeds):
            rows.append(measured(network, data, arguments.epochs, seed))
            about = rows[-1]
            print(
                f"{network}, {about['zeros']} zeros: float32 {about['float32']} %, int8 {about['int8']} %", flush=True
            )
            results.write("int8-accuracy", rows)


if __name__ == "__main__":
    main()
