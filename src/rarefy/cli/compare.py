"""``rarefy compare``; light to import, the work is in rarefy.compare."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.cli import options
from rarefy.cli.outputs import check_file, check_folder

if TYPE_CHECKING:
    from rarefy.compare.plan import Job


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    compare = commands.add_parser("compare", help="methods x targets x seeds: a table and a page")
    compare.add_argument(
        "comparison", metavar="FILE", type=Path, help="a comparison (recipes/compare-fashion-mnist.yaml), or a recipe"
    )
    compare.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe: schedule.epochs=2"
    )
    compare.add_argument("--data", metavar="FOLDER", help="where the data set's files lie (data.folder)")
    compare.add_argument("--run", type=Path, metavar="FOLDER", help="where the runs go; default runs/compare-NAME")
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time, a core each; default all cores")
    compare.add_argument("--ray", metavar="ADDRESS", help='run through Ray: "auto", "local" or a cluster\'s address')
    compare.add_argument("--csv", type=Path, metavar="FILE", help="the table; default compare.csv in the runs' folder")
    compare.add_argument("--html", type=Path, metavar="FILE", help="the page; default compare.html in the runs' folder")
    compare.add_argument("--write-only", action="store_true", help="run nothing: table and page of what is finished")
    options.add_json(compare)
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    """Run what is missing, then write table and page; gives the exit status, 1 if a run failed."""
    from rarefy.compare.page import write
    from rarefy.compare.plan import load
    from rarefy.compare.runner import run
    from rarefy.compare.table import means, rows

    comparison = load(arguments.comparison, options.recipe_changes(arguments))
    folder = arguments.run or Path("runs") / f"compare-{comparison.name}"
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
    check_folder(folder, "--run")
    table, shown = arguments.csv or folder / "compare.csv", arguments.html or folder / "compare.html"
    check_file(table, "--csv")
    check_file(shown, "--html")
    if os.path.realpath(table) == os.path.realpath(shown):
        raise ValueError(f"--csv and --html must be two files, got {table} and {shown}")
    rows(comparison, folder)  # what is finished is whole, or nothing more is run
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
        about: dict[str, Any] = {"html": str(page), "csv": str(table)}
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
