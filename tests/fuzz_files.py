"""Changed native programs with a right checksum, straight into the loader under sanitizers: ``make fuzz``.

Usage: python -m tests.fuzz_files FUZZER COUNT [SEED]. Appends what was found to results/fuzz.csv.
"""

import csv
import datetime
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from rarefy import models
from rarefy.engine.building import NativeSegment
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from tests.engine.layers import lowered
from tests.engine.networks import UNet, Vision, thinned

RESULTS = Path("results/fuzz.csv")


class _LSTM(nn.LSTM):
    """Gives the last state alone, so that it is a tensor."""

    def forward(self, x):
        return super().forward(x)[1][1]


class _GRU(nn.GRU):
    """The same."""

    def forward(self, x):
        return super().forward(x)[1]


class _Attention(nn.Module):
    """Attention with a mask, of heads in the place of channels, and a product with a softmax that is none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.randn(8, 8))

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(x, x, x, self.bias)
        return nn.functional.scaled_dot_product_attention(x, y, y, is_causal=True) @ x.softmax(2)


def networks() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Convolutions in bands, depthwise ones, concatenation, transformers, attention, recurrences; thinned or not."""
    banded = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.MaxPool2d(2)
    )
    dense = nn.Sequential(nn.Conv2d(3, 8, 5, 2, groups=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 5))
    norms = nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(2, 8), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    chains = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.ELU(), nn.Softplus(), nn.UpsamplingBilinear2d(scale_factor=2)),
        *(nn.Upsample(size=(9, 11)), nn.Conv2d(6, 2, 1)),
    )
    return [
        *((norms.eval(), (4, 16)), (chains.eval(), (3, 6, 7))),
        *((thinned(UNet()), (3, 16, 16)), (thinned(Vision()), (3, 16, 16)), (thinned(banded), (3, 32, 32))),
        *((dense.eval(), (3, 16, 16)), (thinned(models.create("resnet20")), (3, 16, 16))),
        (_Attention().eval(), (3, 8, 8)),
        *((thinned(kind(8, 16, 2, batch_first=True)), (t, 8)) for kind in (_LSTM, _GRU) for t in (1, 4)),
    ]


def write_seeds(folder: Path) -> list[Path]:
    """The programs of the networks, with weights of either kind."""
    torch.manual_seed(0)
    files = []
    for model, shape in networks():
        x = torch.randn(2, *shape)
        for precision in ("float32", "bfloat16"):
            for item in lowered(optimize(capture(model, (x,))), x, precision=precision).items:
                if isinstance(item, NativeSegment):
                    files.append(folder / f"{len(files)}.program")
                    files[-1].write_bytes(item.program.save())
    return files


def main() -> int:
    fuzzer, count, seed = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "1"
    with tempfile.TemporaryDirectory() as folder:
        seeds = write_seeds(Path(folder))
        done = subprocess.run([fuzzer, count, seed, *map(str, seeds)], stdout=subprocess.PIPE, text=True, check=False)
    mutants, loaded, ran, longest = done.stdout.strip().split(",") if done.returncode == 0 else (count, "", "", "")
    row = {
        "mutants": mutants,
        "loaded": loaded,
        "ran": ran,
        "crashes": int(done.returncode != 0),
        "longest_seconds": longest,
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": f"python -m tests.fuzz_files FUZZER {count} {seed}",
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
