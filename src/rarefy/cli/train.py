"""``rarefy train``; light to import, the work is in rarefy.train."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from rarefy.cli import options
from rarefy.cli.outputs import check_folder
from rarefy.cli.report import print_summary


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    train = commands.add_parser("train", help="train by a recipe into a folder of its own, and write its report")
    train.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, for example recipes/demo.yaml")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: method.target=0.95"
    )
    train.add_argument("--data", metavar="FOLDER", help="where the data set's files lie (data.folder)")
    train.add_argument("--run", type=Path, metavar="FOLDER", help="the run's folder; default a new one, runs/NAME")
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder where it stopped")
    train.add_argument(
        "--baseline", type=Path, metavar="RUN", help="a dense run's folder, to compare with in the report"
    )
    options.add_json(train)
    train.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    from rarefy import report, train
    from rarefy.train.progress import watched

    recipe = train.load(arguments.recipe, options.recipe_changes(arguments))
    folder = arguments.run or _folder(recipe.name, arguments.resume)
    check_folder(folder, "--run")
    if not arguments.resume and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds a run already: add --resume to go on with it, or name another --run")
    if arguments.baseline is not None:
        report.load(arguments.baseline)
    # Every process has looked at the folder before the main one writes: they meet when the data is loaded.
    run = train.prepare(recipe, folder, resume=arguments.resume)
    if run.is_main:
        begun = f", from step {run.step} of {run.total_steps}" if run.step else ""
        about = f"training {recipe.model.name} with {recipe.method.name} into {folder}{begun}"
        options.say(about)
    with watched(quiet=not run.is_main) as watch:
        try:
            summary = run.train(watch)
        except train.TrainingInterruptedError as stopped:
            summary = None
            if run.is_main:
                options.say(f"rarefy: {stopped}; the same with --run {folder} --resume goes on")
    if summary is None:
        return 128 + (watch.signal or signal.SIGTERM)  # another process may have got the signal
    if not run.is_main:
        return 0
    page = report.write(folder, baseline=arguments.baseline)
    if arguments.json:
        print(json.dumps({**summary, "report": str(page)}))
    else:
        print_summary(folder, page, arguments.baseline)
    return 0


def _folder(name: str, resume: bool) -> Path:
    """The first of runs/NAME, runs/NAME-2, ... that is free; to resume, the last that is not."""
    candidate, number = Path("runs") / name, 1
    last = candidate
    while candidate.exists():
        last, number = candidate, number + 1
        candidate = Path("runs") / f"{name}-{number}"
    return last if resume else candidate
