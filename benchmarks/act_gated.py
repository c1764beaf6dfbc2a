"""The figures of gated units: ``python benchmarks/act_gated.py`` writes results/act-gated.csv.

``python benchmarks/act_gated.py --print`` prints the table of docs/results/activations.md from that file.
They are those of ``rarefy bench act``, measured alone: one thread, all entries in turn, medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from rarefy._files import write_csv
from rarefy.bench import act, gated

RESULTS = Path(__file__).parents[1] / "results" / "act-gated.csv"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def table() -> str:
    """One row a unit and direction, in memory: nanoseconds an element, and how many times those of memcpy."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        ns = {(row["dtype"], row["entry"]): float(row["ns"]) for row in csv.DictReader(file) if row["size"] == "DRAM"}
    lines = ["| DRAM | ns | times memcpy | PyTorch's ns | ratio |", "| --- | --- | --- | --- | --- |"]
    for dtype in ("bfloat16", "float16", "float32"):
        for function in ("silu", "gelu", "gelu_tanh"):
            for backward in ("", " backward"):
                ours = ns[dtype, f"{'' if backward else 'call '}{function}_and_mul{backward}"]
                theirs = ns[dtype, f"torch.{function} * up{backward}"]
                memcpy = ns[dtype, f"memcpy of {5 if backward else 3} arrays"]
                lines.append(
                    f"| {dtype} {function}_and_mul{backward} | {ours:#.3g} | {ours / memcpy:.1f} | {theirs:#.3g}"
                    f" | {theirs / ours:.1f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Measure at each size that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="L2,DRAM", help="comma-separated: L1, L2, DRAM (default: L2,DRAM)")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="how often each is measured (default: 11)")
    parser.add_argument("--print", action="store_true", help="print the table of the stored results")
    options = parser.parse_args()
    if options.print:
        print(table())
        return
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
