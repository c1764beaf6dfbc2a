"""Trained masks for the benchmark of the engine: ResNet-50 by AutoSparse on Fashion-MNIST, some minutes each.

    python benchmarks/engine_masks.py [--targets 0.8,0.9,0.95] [--steps 300]

The pictures are padded to 32x32 and given to all three channels. What matters here is how a trained mask lies over the
layers and within them, not the accuracy of so short a training (which is printed). Writes the finalized networks to
runs/engine/resnet50-autosparse-TARGET.safetensors, one thread, one after another; those that are there are left.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import AutoSparse, cost, models, save_sparse
from rarefy.data import fashion_mnist
from rarefy.train.batches import normalise
from rarefy.train.optimizer import learning_rate

FOLDER = Path(__file__).parents[1] / "runs" / "engine"
BATCH, LR = 64, 0.01


def path(target: str) -> Path:
    """Of the network trained to this sparsity, "0.9"."""
    return FOLDER / f"resnet50-autosparse-{target}.safetensors"


def pictures(images: Tensor) -> Tensor:
    """(B, 28, 28) uint8 -> (B, 3, 32, 32) float32."""
    padded = F.pad(normalise(images), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return padded.contiguous(memory_format=torch.channels_last)


def train(target: float, steps: int) -> nn.Module:
    """ResNet-50 with all its 1000 outputs, of which ten are used."""
    torch.manual_seed(0)
    data = fashion_mnist.load()
    model = models.resnet50().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in model.named_modules():
        if name.endswith("bn3"):  # blocks begin as the identity: so deep a network learns nothing in so few steps else
            nn.init.zeros_(module.weight)
    sparsifier = AutoSparse(model, target=target, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    sparsifier.attach(optimizer)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * learning_rate(step, 0.05 * steps, steps)
        pick = torch.randint(len(data.train_images), (BATCH,))
        loss = F.cross_entropy(model(pictures(data.train_images[pick])), data.train_labels[pick])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 19:
            about = f"loss {loss.item():.3f}  sparsity {sparsifier.sparsity():.4f}"
            print(f"{target:g}  step {step + 1} of {steps}  {about}  {time.monotonic() - began:.0f} s", flush=True)
    model = sparsifier.finalize().eval()
    some = slice(0, 1000)
    with torch.no_grad():
        found = torch.cat([model(pictures(part)).argmax(1) for part in torch.split(data.test_images[some], 100)])
    accuracy = (found == data.test_labels[some]).float().mean()
    left = cost.count(model, torch.zeros(1, 3, 224, 224))
    print(
        f"{target:g}  zeros {left.sparsity:.4f}  MACs {left.ratio:.4f} of dense  test accuracy {accuracy:.3f}",
        flush=True,
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="0.8,0.9,0.95", help="comma-separated sparsities")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(5)  # minutes of work that nobody waits for
    for target in arguments.targets.split(","):
        if not path(target).exists():
            model = train(float(target), arguments.steps).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            save_sparse(model, path(target))
            print(path(target), flush=True)


if __name__ == "__main__":
    main()
