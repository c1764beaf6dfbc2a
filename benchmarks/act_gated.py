"""The figures of gated units: ``python benchmarks/act_gated.py`` writes results/act-gated.csv.

They are those of ``rarefy bench act``, measured alone: one thread, all entries in turn, medians over the rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rarefy._files import write_csv
from rarefy.bench import act, gated

RESULTS = Path(__file__).parents[1] / "results" / "act-gated.csv"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> None:
    """Measure at each size that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="L2,DRAM", help="comma-separated: L1, L2, DRAM (default: L2,DRAM)")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="how often each is measured (default: 11)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for size in options.sizes.split(","):
        for dtype in DTYPES:
            n = act.SIZES[size] if dtype != torch.float32 else act.SIZES[size] // 2
            x = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
            times = act.interleave(act.timers(gated.calls(x, compiled=size == "L2")), n, options.rounds)
            found += [act.Measured(size, str(dtype).removeprefix("torch."), e, *t) for e, t in times.items()]
    about = act.environment(f"python benchmarks/act_gated.py --sizes {options.sizes} --rounds {options.rounds}")
    write_csv(RESULTS, act.rows(found, about))
    print(act.text(found, []))


if __name__ == "__main__":
    main()
