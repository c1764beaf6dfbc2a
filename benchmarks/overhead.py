"""What AutoSparse adds to a training step: dense and sparse steps of the same network in turn, one pinned thread.

    python benchmarks/overhead.py [--seconds 60]

Prints and stores, for each network, the median step of each and the median of the ratios pair by pair; time is the
process's own CPU time, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import results
from rarefy.models import fashion_cnn, resnet20
from rarefy.sparse import AutoSparse

BATCH = 128
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": lambda: resnet20(in_channels=1), "fashion_cnn": fashion_cnn}


def step_of(
    build: Callable[[], nn.Module], sparse: bool, x: Tensor, y: Tensor, **options: float | str
) -> Callable[[], None]:
    """One whole training step: forward, backward, optimizer, and the sparsifier if there is one."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if sparse:
        AutoSparse(model, total_steps=1000, **options).attach(optimizer)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def timed(step: Callable[[], None]) -> float:
    """Milliseconds of CPU time of one step."""
    began = time.process_time()
    step()
    return (time.process_time() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure each network")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    x = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    rows = []
    for name, build in NETWORKS.items():
        dense, sparse = step_of(build, False, x, y), step_of(build, True, x, y, target=0.9)
        for step in (dense, sparse):
            for _ in range(5):
                step()
        pairs: list[tuple[float, float]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            order = (dense, sparse) if len(pairs) % 2 else (sparse, dense)
            times = {step: timed(step) for step in order}
            pairs.append((times[dense], times[sparse]))
        ratios = sorted(b / a for a, b in pairs)
        quartiles = statistics.quantiles(ratios, n=4)
        row = {
            "network": name,
            "batch_size": BATCH,
            "dense_ms": round(statistics.median(a for a, _ in pairs), 2),
            "autosparse_ms": round(statistics.median(b for _, b in pairs), 2),
            "overhead_percent": round(100 * (statistics.median(ratios) - 1), 1),
            "overhead_quartiles": f"{100 * (quartiles[0] - 1):.1f} to {100 * (quartiles[2] - 1):.1f}",
            "pairs": len(pairs),
        }
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append({**row, **results.provenance()})
    print(results.write("overhead", rows))


if __name__ == "__main__":
    main()
