"""GNMT by mode of its activations and by sparsity, in bfloat16: results/gnmt.csv.

    rarefy data translation --output ende.tsv
    python benchmarks/gnmt.py --corpus ende.tsv [--folder runs/gnmt] [--at-once 15] [--only exact-dense-0 ...]
    python benchmarks/gnmt.py --made-up --methods autosparse gmp st3 --seeds 1     # results/gnmt-made-up.csv
    python benchmarks/gnmt.py --print [--name gnmt-made-up]     # the tables of docs/results/translation.md

Dense in the modes exact, ktanh and hard, and AutoSparse at 80 and 90 % in mode exact, three seeds each: the same
network, encoding, data and steps; runs of one seed begin at the same weights. Every run is one of ``rarefy train`` in a
process of its own, so many at once; what was cut off goes on where it was when the command is given again, and what is
finished is kept. A row is an evaluation; the last of a run has the BLEU of the test set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import results
from rarefy.compare.table import half_interval
from rarefy.data.loading import cores

MODES = ("exact", "ktanh", "hard")
SPARSITIES = (0.8, 0.9)
SEEDS = (0, 1, 2)


def made_up(place: Path) -> Path:
    """Write a corpus of a made-up language: word by word, the first two of more than four words last."""
    chosen = random.Random(0)
    languages = [
        ["".join(chosen.choice("bcdfgklmnprst") + chosen.choice("aeiou") for _ in range(3)) for _ in range(120)]
        for _ in range(2)
    ]
    lines = []
    for split, count in (("train", 16000), ("valid", 400), ("test", 50)):
        for _ in range(count):
            words = [chosen.randrange(120) for _ in range(chosen.randint(3, 7))]
            moved = words[2:] + words[:2] if len(words) > 4 else words
            english, german = (
                " ".join(language[word] for word in some)
                for language, some in zip(languages, (words, moved), strict=True)
            )
            lines.append(f"{split}\tmade up\t{english}\t{german}\n")
    place.write_text("".join(lines))
    return place


def recipe(mode: str, method: dict[str, Any], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of one run."""
    options = {"hidden_size": given.width, "num_layers": given.layers, "dropout": 0.2}
    data = {"folder": str(given.corpus.resolve()), "longest": given.longest, "train_size": given.pairs}
    if given.tokenizer is not None:
        data["tokenizer"] = str(given.tokenizer.resolve())
    schedule = {
        "epochs": given.epochs,
        "batch_size": given.tokens,
        "warmup_epochs": given.warmup,
        "label_smoothing": 0.1,
    }
    return {
        "name": "gnmt",
        "model": {"name": "gnmt", "mode": mode, **options},
        "method": method,
        "data": {"name": "translation", "vocab_size": given.vocabulary, **data},
        "optimizer": {"name": "adamw", "lr": given.lr, "weight_decay": 0.0, "clip_norm": 1.0},
        "schedule": schedule,
        "seed": seed,
        "precision": given.precision,
    }


def runs(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the recipes by name: those of a seed together, so that what is cut off is still paired."""
    found = {}
    for seed in SEEDS[: given.seeds]:
        for mode in MODES:
            found[f"{mode}-dense-0-{seed}"] = recipe(mode, {"name": "dense"}, seed, given)
        for method in given.methods:
            for target in SPARSITIES:
                sparse = {"name": method, "target": target}
                found[f"exact-{method}-{100 * target:.0f}-{seed}"] = recipe("exact", sparse, seed, given)
    return {name: run for name, run in found.items() if not given.only or name.rpartition("-")[0] in given.only}


def rows(name: str, folder: Path, recipe: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluations of a run; of what is not finished, without what it came to."""
    environment = json.loads((folder / "environment.json").read_text())
    finished = folder / "summary.json"
    summary = json.loads(finished.read_text()) if finished.exists() else {}
    mode, method, sparsity, seed = name.split("-")
    options, data = recipe["model"], recipe["data"]
    network = f"{options['num_layers']} x {options['hidden_size']}"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if record["event"] == "eval"]

    def last(key: str, form: str) -> str:
        ended = record is evaluations[-1] and key in summary
        return format(summary[key], form) if ended else ""

    found = []
    for record in evaluations:
        row = {"network": network, "longest": data["longest"], "mode": mode, "method": method}
        row |= {
            "target": f"{int(sparsity) / 100:g}",
            "seed": seed,
            "step": record["step"],
            "valid_perplexity": f"{record['valid_perplexity']:.4f}",
        }
        row |= {"sparsity": f"{record.get('sparsity') or 0.0:.4f}", "test_bleu": last("test_bleu", ".2f")}
        row |= {"training_flops": last("training_flops_ratio", ".3f"), "seconds": last("seconds", ".0f")}
        row |= {"signature": last("bleu_signature", ""), "device": environment.get("gpu") or environment["cpu"]}
        found.append({**row, **about})
    return found


def mean(values: list[float], digits: int) -> str:
    """Return a mean, with the half width of its 95 % interval where there are several."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def table(name: str) -> str:
    """Return the means over seeds, and how far a mode is from the exact one of the same seed, in Markdown."""
    runs: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in results.read(name):
        place = results.processor(row) if row["device"] == row["cpu"] else row["device"]
        key = (row["network"], row["longest"], place, row["mode"], row["method"], row["target"])
        runs.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    lines = [["network", "device", "mode", "method", "steps", "seeds", "perplexity", "over exact", "BLEU"]]
    for (network, longest, place, mode, method, target), seeds in runs.items():
        steps = min(int(each[-1]["step"]) for each in seeds.values())  # those of a run that was cut off, for all

        def reached(found: dict[str, list[dict[str, str]]], step: int = steps) -> dict[str, float]:
            at = {
                seed: [row["valid_perplexity"] for row in some if int(row["step"]) == step]
                for seed, some in found.items()
            }
            return {seed: float(perplexity[0]) for seed, perplexity in at.items() if perplexity}

        ended, exact = reached(seeds), reached(runs.get((network, longest, place, "exact", "dense", "0"), {}))
        apart = [ended[seed] - exact[seed] for seed in ended if seed in exact and (mode, method) != ("exact", "dense")]
        scores = [float(each[-1]["test_bleu"]) for each in seeds.values() if each[-1]["test_bleu"]]
        sparsity = "" if method == "dense" else f", {100 * float(target):.0f} %"
        cells = [network, place, mode, f"{method}{sparsity}", str(steps)]
        cells += [str(len(seeds)), mean(list(ended.values()), 2)]
        lines.append([*cells, mean(apart, 2) if apart else "", mean(scores, 1) if scores else ""])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def train(names: dict[str, dict[str, Any]], folder: Path, at_once: int) -> None:
    """Run what is not finished, so many processes at once; raises RuntimeError if one failed."""
    waiting = [name for name in names if not (folder / name / "summary.json").exists()]
    share = str(cores(at_once))
    threads = {"OMP_NUM_THREADS": share, "RAYON_NUM_THREADS": share}  # of PyTorch, and of the encoding
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            place = folder / name
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(names[name], sort_keys=False))
            command = [sys.executable, "-m", "rarefy", "train", str(file), "--run", str(place)]
            command += ["--resume"] if (place / "recipe.yaml").exists() else []
            print(shlex.join(command), flush=True)
            with (folder / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **threads})
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                failed += [name] if process.returncode else []
                print(name, "failed, see its .log" if process.returncode else "done", flush=True)
    if failed:
        raise RuntimeError(f"these runs failed: {', '.join(failed)}; their .log files say why")


def main() -> None:
    """Train, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="what rarefy data translation made")
    parser.add_argument("--folder", type=Path, default=Path("runs/gnmt"), help="of the runs (default: runs/gnmt)")
    parser.add_argument("--tokenizer", type=Path, help="an encoding, in place of a new one for each run")
    parser.add_argument("--made-up", action="store_true", help="a made-up language, in minutes on a CPU")
    parser.add_argument("--methods", nargs="*", default=["autosparse"], help="sparse methods (default: autosparse)")
    parser.add_argument("--precision", help="default: bf16, and fp32 of the made-up language")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--longest", type=int, default=40, help="tokens of a sentence at most (default: 40)")
    parser.add_argument("--pairs", type=int, help="only the first so many")
    parser.add_argument("--tokens", type=int, default=8000, help="of a batch (default: 8000)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.5, help="epochs of rising learning rate (default: 0.5)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--at-once", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--only", nargs="*", help="runs, such as ktanh-dense-0 or exact-autosparse-90")
    parser.add_argument("--collect", action="store_true", help="train nothing; write what there is")
    parser.add_argument("--name", default="gnmt", help="of the results' file (default: gnmt)")
    parser.add_argument("--print", action="store_true", help="print the table from the file")
    given = parser.parse_args()
    if given.print:
        print(table(given.name))
        return
    if given.corpus is None and not given.made_up:
        parser.error("--corpus is missing")
    given.precision = given.precision or ("fp32" if given.made_up else "bf16")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.made_up:
        given.corpus, given.name = made_up(given.folder / "made-up.tsv"), "gnmt-made-up"
        given.width, given.vocabulary, given.tokens, given.longest = 128, 500, 1000, 16
    names = runs(given)
    try:
        if not given.collect:
            train(names, given.folder, given.at_once)
    finally:
        about = results.provenance()
        begun = [name for name in names if (given.folder / name / "metrics.jsonl").exists()]
        made = [row for name in begun for row in rows(name, given.folder / name, names[name], about)]
        key = ("network", "longest", "mode", "method", "target", "seed", "device", "native_isa")
        again = {tuple(str(row[each]) for each in key) for row in made}
        kept: list[Any] = [row for row in results.read(given.name) if tuple(row[each] for each in key) not in again]
        if made:
            print(results.write(given.name, [*kept, *made]))


if __name__ == "__main__":
    main()
