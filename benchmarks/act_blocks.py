"""Two blocks of networks in bfloat16 on the CPU, before and after: ``python benchmarks/act_blocks.py``.

One block of a vision tower as SigLIP's (1152 wide, 16 heads, 729 tokens, tanh-GELU MLP of 4304) and one MLP as Llama's
(2048 to 8192, SiLU and a gate, 256 tokens), with PyTorch's activations and with those of rarefy.act; random weights.
Both forms run in turn on one thread, by its processor time, since the turns of others are not theirs. The medians, also
of one form's time over the other's in a round, and the errors against the same weights in float64 go to
results/act-blocks.csv; ``--print`` prints the table of docs/results/activations.md from that file.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import act
from rarefy._files import write_csv
from rarefy.environment import provenance

RESULTS = Path(__file__).parents[1] / "results" / "act-blocks.csv"

Activation = Callable[[Tensor], Tensor]
Unit = Callable[[Tensor, Tensor], Tensor]


class Vision(nn.Module):
    """A block of a vision transformer: norm, attention, norm, MLP."""

    def __init__(self, activation: Activation, width: int = 1152, hidden: int = 4304, heads: int = 16) -> None:
        super().__init__()
        self.activation, self.heads = activation, heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return [1, tokens, width]."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(self.activation(self.fc1(self.norms[1](x))))
        return y


class Gated(nn.Module):
    """The MLP of a language model."""

    def __init__(self, unit: Unit, width: int = 2048, hidden: int = 8192) -> None:
        super().__init__()
        self.unit = unit
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return [1, tokens, width]."""
        y: Tensor = self.down(self.unit(self.gate(x), self.up(x)))
        return y


def gelu(x: Tensor) -> Tensor:
    """PyTorch's."""
    return F.gelu(x, approximate="tanh")


def our_gelu(x: Tensor) -> Tensor:
    """The same, correctly rounded."""
    return act.gelu(x, approximate="tanh")


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """PyTorch's two steps."""
    return F.silu(gate) * up


def build() -> dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]]:
    """Both forms of each block in bfloat16, of the same weights, and the shape of its input."""
    torch.manual_seed(0)
    vision, gated = Vision(gelu).bfloat16(), Gated(silu_and_mul).bfloat16()
    found: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {}
    for name, before, shape in (("vision block", vision, (1, 729, 1152)), ("gated MLP", gated, (1, 256, 2048))):
        after = copy.deepcopy(before)
        if isinstance(after, Vision):
            after.activation = our_gelu
        else:
            after.unit = act.silu_and_mul
        found[name] = before, after, shape
    return found


@torch.no_grad()
def measure(rounds: int) -> list[dict[str, object]]:
    """One row a form of a block: milliseconds and root mean square error, relative to that of the result."""
    torch.set_num_threads(1)
    about = provenance(f"python benchmarks/act_blocks.py --rounds {rounds}")
    rows: list[dict[str, object]] = []
    for block, (before, after, shape) in build().items():
        x = torch.randn(shape).bfloat16()
        true = copy.deepcopy(before).double()(x.double())
        forms = {"PyTorch": before, "rarefy.act": after}
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        error = {
            name: float((form(x).double() - true).square().mean().sqrt() / true.square().mean().sqrt())
            for name, form in forms.items()
        }
        for _ in range(rounds):
            for name, form in forms.items():
                begin = time.thread_time()
                form(x)
                seconds[name].append(time.thread_time() - begin)
        pairs = {name: zip(seconds["PyTorch"], times, strict=True) for name, times in seconds.items()}
        faster = {name: statistics.median(one / other for one, other in each) for name, each in pairs.items()}
        for name in forms:
            rows.append(
                {
                    "block": block,
                    "activations": name,
                    "ms": f"{1000 * statistics.median(seconds[name]):.5g}",
                    "times_faster": f"{faster[name]:.4f}",
                    "relative_error": f"{error[name]:.4e}",
                    "rounds": rounds,
                    **about,
                }
            )
    return rows


def table() -> str:
    """One row a block and form."""
    lines = ["| bfloat16 | activations | ms | times as fast | relative error |", "| --- | --- | --- | --- | --- |"]
    with RESULTS.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kept = (row[key] for key in ("block", "activations", "ms", "times_faster", "relative_error"))
            lines.append(f"| {' | '.join(kept)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the rows and print what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="how often each runs (default: 15)")
    parser.add_argument("--print", action="store_true", help="print the table of the stored results")
    options = parser.parse_args()
    if not options.print:
        write_csv(RESULTS, measure(options.rounds))
    print(table())


if __name__ == "__main__":
    main()
