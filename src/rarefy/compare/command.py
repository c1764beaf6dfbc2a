"""``rarefy compare FILE``: what it does and prints; its arguments are in :mod:`rarefy.cli`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rarefy._outputs import check_file, check_folder
from rarefy.compare.page import write
from rarefy.compare.plan import Job, load
from rarefy.compare.runner import run
from rarefy.compare.table import means, rows


def compare(arguments: argparse.Namespace) -> int:
    """Run what is missing, then write table and page; gives the exit status, 1 if a run failed."""
    changes = list(arguments.set)
    if arguments.data is not None:
        changes.append(f"data.folder={json.dumps(arguments.data, ensure_ascii=False)}")
    comparison = load(arguments.comparison, changes)
    folder = arguments.run or Path("runs") / f"compare-{comparison.name}"
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
    check_folder(folder, "--run")
    check_file(arguments.csv or folder / "compare.csv", "--csv")
    check_file(arguments.html or folder / "compare.html", "--html")
    failed: dict[str, str] = {}
    if not arguments.write_only:
        began = time.monotonic()

        def tell(job: Job, error: str | None, done: int, total: int, left: float) -> None:
            said = f"{done}/{total}  {job.folder}  {'failed: ' + error if error else 'done'}"
            gone = time.monotonic() - began
            print(f"{said}  {_minutes(gone)} gone, about {_minutes(left)} left", file=sys.stderr, flush=True)

        print(f"{len(comparison.jobs)} runs into {folder}; finished ones are kept", file=sys.stderr, flush=True)
        # SIGTERM like Ctrl-C, so that the runs end with this process.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = run(comparison, folder, jobs=arguments.jobs, ray_address=arguments.ray, tell=tell)
        finally:
            signal.signal(signal.SIGTERM, before)
    page = write(comparison, folder, csv=arguments.csv, html=arguments.html)
    found = means(rows(comparison, folder))
    if arguments.json:
        about: dict[str, Any] = {"html": str(page), "csv": str(arguments.csv or folder / "compare.csv")}
        content = [{**vars(mean), "interval": None if mean.runs == 1 else mean.interval} for mean in found]
        print(json.dumps({**about, "failed": failed, "means": content}))
    else:
        for mean in found:
            spread = "" if mean.runs == 1 else f"±{mean.interval:.2f}"
            target = "" if mean.target is None else f"{mean.target:g}"
            costs = f"{100 * mean.inference_flops:5.1f} % {100 * mean.training_flops:5.1f} %"
            print(
                f"{target:>5} {mean.label[:36]:36} {mean.accuracy:6.2f} {spread:6} {100 * mean.sparsity:6.2f} % {costs}"
            )
        print(page)
    for name, error in failed.items():
        print(f"rarefy: {name} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
