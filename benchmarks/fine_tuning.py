"""Fine-tuning trained networks sparse, at the rates that fine-tuning is done at: GMP, AutoSparse and STR side by side.

    python benchmarks/fine_tuning.py [--seeds 3] [--networks mlp transformer cnn] [--rates adamw-1e-4 ...]

Trains each network densely, once for each seed, and goes on from there to 70 and 90 % zeros by every method with the
same batches. Rows go to results/fine-tuning.csv as they come; started again, it does only what is missing. ``--print``
prints the table of docs/autosparse.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import results
from rarefy import sparse
from rarefy.data import fashion_mnist
from rarefy.models import fashion_cnn

BATCH = 64
TARGETS = (0.7, 0.9)

#: label -> method and options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GMP": ("gmp", {}),
    "AutoSparse": ("autosparse", {}),
    "AutoSparse, cost": ("autosparse", {"policy": "cost"}),
    "STR": ("str", {}),
}

#: label -> optimizer and learning rate
RATES: dict[str, tuple[type[torch.optim.Optimizer], float]] = {
    "adamw-1e-4": (torch.optim.AdamW, 1e-4),
    "adamw-3e-5": (torch.optim.AdamW, 3e-5),
    "adamw-1e-5": (torch.optim.AdamW, 1e-5),
    "sgd-1e-2": (torch.optim.SGD, 1e-2),
    "sgd-1e-3": (torch.optim.SGD, 1e-3),
}

#: How long, and how the rate goes: "linear" is a warm-up over a tenth, then down to 0, as Hugging Face's trainer does.
LENGTHS = ((300, "linear"), (500, "constant"))


@dataclass(frozen=True)
class Task:
    """A network, its data (a tensor of labels goes with each of inputs) and how it is trained densely."""

    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    steps: int
    rate: float


class Recall(nn.Module):
    """A small transformer over (B, 16) tokens below 16; the answer is the token at the place that the first names."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, width), nn.Parameter(0.1 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 16) -> (B, 16) logits."""
        logits: Tensor = self.head(self.encoder(self.tokens(tokens) + self.places)[:, 0])
        return logits


def mlp() -> Task:
    """32 numbers, of which another network has made 8 classes."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(14_000, 32)
    with torch.no_grad():
        y = teacher(x).argmax(1)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))

    return Task(build, (x[:10_000], y[:10_000]), (x[10_000:], y[10_000:]), 3000, 2e-3)


def transformer() -> Task:
    """See :class:`Recall`."""
    tokens = torch.randint(16, (34_000, 16), generator=torch.Generator().manual_seed(0))
    answers = tokens.gather(1, tokens[:, :1]).squeeze(1)
    return Task(Recall, (tokens[:30_000], answers[:30_000]), (tokens[30_000:], answers[30_000:]), 3000, 1e-3)


def cnn() -> Task:
    """The small network of recipes/fashion-mnist.yaml on Fashion-MNIST."""
    data = fashion_mnist.load()

    def images(some: Tensor) -> Tensor:
        scaled = some.float().unsqueeze(1) / 255.0
        return ((scaled - 0.2860) / 0.3530).contiguous(memory_format=torch.channels_last)

    def build() -> nn.Module:
        return fashion_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    train = images(data.train_images[:20_000]), data.train_labels[:20_000]
    return Task(build, train, (images(data.test_images), data.test_labels), 1500, 2e-3)


TASKS: dict[str, Callable[[], Task]] = {"mlp": mlp, "transformer": transformer, "cnn": cnn}


def fit(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, steps: int, schedule: str, seed: int) -> None:
    """Train for so many steps; "cosine" is that of the dense network."""
    factors: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "linear": lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)),
        "cosine": lambda step: 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item(),
    }
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors[schedule])
    x, y = task.train
    batches = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """In percent, on images and sequences that no step saw."""
    model.eval()
    hits = [
        (model(x).argmax(1) == y).float() for x, y in zip(*(torch.split(part, 2000) for part in task.test), strict=True)
    ]
    return 100.0 * torch.cat(hits).mean().item()


def dense(task: Task, seed: int) -> nn.Module:
    """The trained network that all methods go on from."""
    torch.manual_seed(seed)
    model = task.build()
    fit(model, task, torch.optim.AdamW(model.parameters(), lr=task.rate), task.steps, "cosine", seed)
    return model


def tuned(
    model: nn.Module, task: Task, method: str, target: float, rate: str, length: tuple[int, str], seed: int
) -> tuple[nn.Module, float]:
    """A copy of the network, made sparse, and the sparsity that it came to before ``finalize()``."""
    model = copy.deepcopy(model)
    name, options = METHODS[method]
    sparsifier = sparse.create(name, model, target=target, total_steps=length[0], **options)
    kind, lr = RATES[rate]
    momentum: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=lr, **momentum)  # type: ignore[call-arg]
    sparsifier.attach(optimizer)
    fit(model, task, optimizer, *length, 1000 + seed)
    landed = sparsifier.sparsity()
    sparsifier.finalize()
    return model, landed


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean accuracy over the seeds, and what each method is off GMP, as Markdown."""

    def mean(**cell: Any) -> float | None:
        same = [float(r["accuracy"]) for r in rows if all(str(r[key]) == str(value) for key, value in cell.items())]
        return statistics.mean(same) if same else None

    lines = ["| network | optimizer | steps | target | dense | " + " | ".join(METHODS) + " |", "|---" * 9 + "|"]
    for network in TASKS:
        for rate in RATES:
            for steps, schedule in LENGTHS:
                for target in TARGETS:
                    cell = {"network": network, "rate": rate, "steps": steps, "schedule": schedule, "target": target}
                    means = [mean(method=method, **cell) for method in METHODS]
                    if any(value is not None for value in means):
                        shown = " | ".join("" if value is None else f"{value:.1f}" for value in means)
                        lines.append(
                            f"| {network} | {rate} | {steps}, {schedule} | {target} "
                            f"| {mean(network=network, method='dense'):.1f} | {shown} |"
                        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--print", action="store_true", help="print the table of what is there and measure nothing")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = list(results.read("fine-tuning"))
    if arguments.print:
        print(table(rows))
        return
    torch.set_num_threads(1)
    columns = ("network", "method", "rate", "steps", "schedule", "target", "seed")
    about = results.provenance()

    def done(*cell: Any) -> bool:
        return any(tuple(str(row[key]) for key in columns) == tuple(map(str, cell)) for row in rows)

    def add(cell: tuple[Any, ...], model: nn.Module, landed: float, seconds: float) -> None:
        row = {
            **dict(zip(columns, cell, strict=True)),
            "accuracy": round(accuracy(model, task), 2),
            "sparsity": round(landed, 5),
            "seconds": round(seconds, 1),
        }
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append({**row, **about})
        results.write("fine-tuning", rows)

    for network in arguments.networks:
        task = TASKS[network]()
        for seed in range(arguments.seeds):
            began = time.monotonic()
            trained = dense(task, seed)
            plain = (network, "dense", "", task.steps, "cosine", "", seed)
            if not done(*plain):
                add(plain, trained, 0.0, time.monotonic() - began)
            for rate in arguments.rates:
                for length in LENGTHS:
                    for target in TARGETS:
                        for method in METHODS:
                            cell = (network, method, rate, *length, target, seed)
                            if done(*cell):
                                continue
                            began = time.monotonic()
                            with warnings.catch_warnings():
                                warnings.simplefilter("ignore")
                                model, landed = tuned(trained, task, method, target, rate, length, seed)
                            add(cell, model, landed, time.monotonic() - began)
    print(table(rows))


if __name__ == "__main__":
    main()
