"""Training GNMT on the CPU with nn.LSTM and with rarefy.act; writes results/translation-training.csv.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/translation_training.py
    python benchmarks/translation_training.py --print    # the table of docs/guides/translation.md

A step is forward, backward, clipping and AdamW of one batch of sentences of one length, in one thread. All entries run
in turns; the median of the turns' CPU time counts. A token is one of the target. The share of tanh and sigmoid is that
of ``rarefy train``: see rarefy.train.activation_share. An entry that PyTorch refuses has a row that says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import results
from rarefy.models import GNMT
from rarefy.train import activation_share

NAME = "translation-training"
VOCABULARY, HIDDEN, LAYERS = 8000, 512, 2
#: sentences, and tokens of each on both sides
BATCH, LENGTH = 10, 25

#: mode of the activations, and format of autocast
ENTRIES = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("exact", "float32"),
    ("exact", "bfloat16"),
    ("ktanh", "bfloat16"),
)


def loss_of(model: GNMT, dtype: str) -> Callable[[], Tensor]:
    """The forward of a batch of random tokens: its loss."""
    source, target, following = torch.randint(4, VOCABULARY, (3, BATCH, LENGTH)).unbind()
    lengths = torch.full((BATCH,), LENGTH)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(source, lengths, target)
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    return loss


def training(model: GNMT, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def run(turns: int) -> None:
    """Measure all entries and write the file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {entry: GNMT(VOCABULARY, hidden_size=HIDDEN, num_layers=LAYERS, mode=entry[0]) for entry in ENTRIES}
    losses = {entry: loss_of(model, entry[1]) for entry, model in models.items()}
    steps = {entry: training(model, losses[entry]) for entry, model in models.items()}
    refused: dict[tuple[str, str], str] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(turns + 1):
        for entry, step in steps.items():
            if entry in refused:
                continue
            begin = time.process_time()
            try:
                step()
            except RuntimeError as error:
                refused[entry] = str(error).partition(".")[0]
                continue
            if turn:  # the first warms up
                times.setdefault(entry, []).append(time.process_time() - begin)
    rows: list[dict[str, Any]] = []
    about = results.provenance()
    for entry, model in models.items():
        row: dict[str, Any] = {"mode": entry[0], "dtype": entry[1], "tokens": BATCH * LENGTH}
        if entry in times:
            seconds, share = statistics.median(times[entry]), activation_share.measure(model, losses[entry]).share
            row |= {"seconds": f"{seconds:.4g}", "tokens_per_s": f"{BATCH * LENGTH / seconds:.4g}"}
            row |= {"activation_share": f"{share:.3g}", "refused": ""}
        else:
            row |= {"seconds": "", "tokens_per_s": "", "activation_share": "", "refused": refused[entry]}
        rows.append({**row, **about})
        print(*row.values())
    here = results.processor(about)
    results.write(NAME, [*(row for row in results.read(NAME) if results.processor(row) != here), *rows])


def table() -> str:
    """Return the file's rows in Markdown."""
    lines = [["processor", "LSTM", "format", "tokens/s", "over nn.LSTM, float32", "tanh and sigmoid"]]
    lines.append(["---", "---", "---", *["--:"] * 3])
    first = 0.0
    for row in results.read(NAME):
        if (row["mode"], row["dtype"]) == ENTRIES[0]:
            first = float(row["tokens_per_s"])
        name = "`nn.LSTM`" if row["mode"] == "torch" else f"`act.LSTM`, {row['mode']}"
        figures = ["does not run", "", ""]
        if row["tokens_per_s"]:
            rate, share = float(row["tokens_per_s"]), float(row["activation_share"])
            figures = [f"{rate:.0f}", f"{rate / first:.2f}", f"{100 * share:.1f} %"]
        lines.append([results.processor(row), name, row["dtype"], *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--print", action="store_true", help="print the table from the file")
    options = parser.parse_args()
    if options.print:
        print(table())
    else:
        run(options.turns)


if __name__ == "__main__":
    main()
