"""Translating by GNMT on one CPU thread, dense and sparse: PyTorch against the engine; writes results/translation.csv.

    python benchmarks/translation.py ende.tsv --network 2x512 --batch 32 --beam 4    # a part: its rows are replaced
    python benchmarks/translation.py --print                         # the table of docs/guides/translation.md

Networks are random, their masks too, of every LSTM, the attention and the output alike: what is measured is time. The
sentences are those of the corpus's test set about its median length; a token is a word. Nothing ends a translation but
its length, that of its source. All entries of a part run in turns; the median of their CPU times counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import results
from rarefy.data import translation
from rarefy.data.translation import BEGIN, END, PADDING
from rarefy.models import GNMT
from rarefy.models.compiled import CompiledGNMT
from rarefy.models.search import Network, translate

NAME = "translation"
VOCABULARY = 8000
#: layers, width, and the shares of zeros that are measured: the large one takes long to compile.
NETWORKS = {"2x512": (2, 512, (0, 80, 90)), "4x1024": (4, 1024, (90,))}
SENTENCES = 32  # that are translated: in one batch, or, of batches of one, every eighth


def network(name: str, percent: int) -> GNMT:
    """A network with so many percent of zeros in its layers; sums of products keep their size."""
    torch.manual_seed(0)
    layers, hidden, _ = NETWORKS[name]
    model = GNMT(VOCABULARY, hidden_size=hidden, num_layers=layers).eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if weight.dim() == 2 and "embedding" not in key:
            weight.mul_(torch.rand(weight.shape) >= percent / 100).div_((1 - percent / 100) ** 0.5)
    model.output.bias[END] = -1e4  # never the best
    return model


def batches(corpus: Path, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Sources (batch, S) and their lengths."""
    texts = sorted((text.split() for text in translation.load(corpus, ("en", "de")).test.source), key=len)
    middle = len(texts) // 2 - SENTENCES // 2
    some = texts[middle : middle + SENTENCES] if batch > 1 else texts[middle : middle + SENTENCES : 8]
    first = 1 + max(PADDING, BEGIN, END)
    tokens = [[*(first + zlib.crc32(word.encode()) % (VOCABULARY - first) for word in text), END] for text in some]
    parts = [tokens[begin : begin + batch] for begin in range(0, len(tokens), batch)]
    return [(translation.padded(part), torch.tensor([len(each) for each in part])) for part in parts]


def measure(
    entries: dict[str, Network], given: list[tuple[Tensor, Tensor]], beam: int, rounds: int
) -> dict[str, float]:
    """Median CPU seconds of translating everything, by entry; the first round, which compiles, does not count."""
    times: dict[str, list[float]] = {name: [] for name in entries}
    for done in range(rounds + 1):
        for name, model in entries.items():
            begin = time.thread_time()
            for source, lengths in given:
                translate(model, source, lengths, begin=BEGIN, end=END, beam=beam, longest=lengths)
            if done:
                times[name].append(time.thread_time() - begin)
    return {name: statistics.median(each) for name, each in times.items()}


def run(corpus: Path, name: str, batch: int, beam: int, rounds: int) -> None:
    """Measure a part and put its rows in the place of those before."""
    torch.set_num_threads(1)
    given = batches(corpus, batch)
    count, longest = sum(len(lengths) for _, lengths in given), max(int(lengths.max()) for _, lengths in given)
    percents = NETWORKS[name][2]
    entries: dict[str, Network] = {"PyTorch": network(name, percents[0])}
    entries |= {f"engine, {percent} % zeros": CompiledGNMT(network(name, percent), threads=1) for percent in percents}
    part, about = {"network": name, "batch": str(batch), "beam": str(beam)}, results.provenance()
    of_part = {**part, "cpu": about["cpu"], "native_isa": about["native_isa"]}
    rows: list[Any] = [row for row in results.read(NAME) if any(row[key] != of_part[key] for key in of_part)]
    found = measure(entries, given, beam, rounds)
    for entry, seconds in found.items():
        row = {**part, "entry": entry, "sentences": count, "longest": longest}
        rate, gain = f"{count / seconds:.4g}", f"{found['PyTorch'] / seconds:.3g}"
        rows.append(
            {**row, "sentences_per_s": rate, "ms_per_sentence": f"{1e3 * seconds / count:.4g}", "gain": gain, **about}
        )
        print(*row.values(), f"{rate} sentences/s, {gain} times PyTorch")
    names = list(NETWORKS)

    def place(row: Mapping[str, str]) -> tuple[str, int, int, int]:
        return results.processor(row), names.index(row["network"]), int(row["batch"]), int(row["beam"])

    rows.sort(key=place)
    results.write(NAME, rows)


def table() -> str:
    """The measurements as Markdown: sentences a second, and how many times as many as PyTorch's."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in results.read(NAME):
        found.setdefault((results.processor(row), row["network"], row["batch"], row["beam"]), {})[row["entry"]] = row
    entries = list(dict.fromkeys(row["entry"] for row in results.read(NAME)))
    head = ("processor", "network", "sentences at once", "beam", *entries)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for part, rows in found.items():
        cells = (f"{rows[e]['sentences_per_s']} ({rows[e]['gain']}x)" if e in rows else "" for e in entries)
        lines.append("| " + " | ".join((*part, *cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path, nargs="?", help="the table that rarefy data translation writes")
    parser.add_argument("--network", choices=NETWORKS, default="2x512")
    parser.add_argument("--batch", type=int, choices=(1, SENTENCES), default=SENTENCES)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="print the table of what was measured")
    arguments = parser.parse_args()
    if arguments.print:
        print(table())
        return
    if arguments.corpus is None:
        parser.error("name the corpus: rarefy data translation --output ende.tsv makes one")
    run(arguments.corpus, arguments.network, arguments.batch, arguments.beam, arguments.rounds)


if __name__ == "__main__":
    main()
