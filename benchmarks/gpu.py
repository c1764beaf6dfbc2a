"""What every method adds to a training step on a GPU: dense and sparse steps of the same network in turn.

    python benchmarks/gpu.py [--only METHOD ...] [--seconds 1.5] [--csv PATH]

ResNet-50 at 224x224 in bfloat16 and channels_last, batches of 256 and 64, eager and compiled (one compilation serves
every method, since the model stays plain), and ResNet-20 for AutoSparse. A ratio is the median over blocks of steps
that alternate with the dense network's, between changes of the masks; ``update_ms`` is what a step that measures or
changes the masks takes more.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import results
from rarefy import environment, models, sparse
from rarefy._files import write_csv

#: Options that a method needs; a target of 90 % otherwise.
OPTIONS: dict[str, dict[str, Any]] = {"nm": {"n": 2, "m": 4, "exclude": ["conv1"]}}

#: So long that no mask changes while steps are timed.
TOTAL_STEPS = 1_000_000

BLOCK = 4


class Case:
    """A network, its optimizer, one batch, and a step."""

    def __init__(self, build: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, compiled: bool) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = build().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = torch.compile(self.model) if compiled else self.model
        self.images = torch.randn(shape, device="cuda").to(memory_format=torch.channels_last)
        self.labels = torch.randint(classes, (shape[0],), device="cuda")
        # A rate of 0: the weights stay, whichever step comes next.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-5, fused=True)
        self.first = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        for _ in range(8):
            self.step()

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def let_go(self) -> None:
        """Forget what a method has attached."""
        self.optimizer._optimizer_step_pre_hooks.clear()
        self.optimizer._optimizer_step_post_hooks.clear()

    def restore(self) -> None:
        """The weights of the beginning: how sparse they are changes a GPU's clock."""
        self.model.load_state_dict(self.first)


def milliseconds(step: Callable[[], None], count: int) -> float:
    """A step's time, the mean of so many."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count


@contextmanager
def dense_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the optimizer steps as if nothing were attached to it."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks


def measure(case: Case, method: str, seconds: float) -> dict[str, Any]:
    """The row of one method: blocks of its steps and of dense ones in turn."""
    case.restore()
    sparsifier = sparse.create(method, case.model, total_steps=TOTAL_STEPS, **OPTIONS.get(method, {"target": 0.9}))
    torch.cuda.reset_peak_memory_stats()
    sparsifier.attach(case.optimizer)
    for _ in range(3):
        case.step()
    rounds = max(3, round(seconds * 1e3 / (2 * BLOCK * milliseconds(case.step, BLOCK))))
    dense, with_method = [], []
    for _ in range(rounds):
        with dense_steps(case.optimizer):
            case.step()
            dense.append(milliseconds(case.step, BLOCK))
        case.step()
        with_method.append(milliseconds(case.step, BLOCK))
    memory = torch.cuda.max_memory_allocated() / 2**30
    sparsifier.steps = sparsifier.interval - 1
    update = milliseconds(case.step, 1)
    sparsifier.finalize()
    ratios = sorted(b / a for a, b in zip(dense, with_method, strict=True))
    return {
        "dense_ms": round(statistics.median(dense), 2),
        "method_ms": round(statistics.median(with_method), 2),
        "ratio": round(statistics.median(ratios), 4),
        "lowest": round(ratios[0], 4),
        "highest": round(ratios[-1], 4),
        "update_ms": round(update - statistics.median(with_method), 2),
        "peak_gib": round(memory, 2),
    }


def resnet20() -> nn.Module:
    """For images of 28x28 in one channel."""
    return models.resnet20(in_channels=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=sparse.list_methods(), help="methods")
    parser.add_argument("--seconds", type=float, default=1.2, help="how long to measure each method in each case")
    parser.add_argument("--csv", type=Path, default=results.FOLDER / "gpu.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of finalizing early, of layers that stay dense
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    cases: list[tuple[str, int, bool, Callable[[], nn.Module], tuple[int, ...], int, Sequence[str]]] = [
        (f"ResNet-50, batch {batch}", batch, compiled, models.resnet50, (batch, 3, 224, 224), 1000, arguments.only)
        for compiled in (False, True)
        for batch in (256, 64)
    ]
    some = [method for method in ("autosparse",) if method in arguments.only]
    cases.insert(2, ("ResNet-20, batch 256", 256, False, resnet20, (256, 1, 28, 28), 10, some))
    about = {
        **environment.describe(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": results.commit(),
    }
    rows = []
    for name, _, compiled, build, shape, classes, methods in cases:
        case = Case(build, shape, classes, compiled)
        for method in methods:
            try:
                found = measure(case, method, arguments.seconds)
            except (RuntimeError, ValueError) as error:
                print(name, method, "FAILED", error, flush=True)
                continue
            finally:
                case.let_go()
            row = {"network": name, "compiled": compiled, "method": method, **found}
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append({**row, "gpu": torch.cuda.get_device_name(), **results.provenance(about)})
            write_csv(arguments.csv, rows)
        del case


if __name__ == "__main__":
    main()
