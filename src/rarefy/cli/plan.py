"""``rarefy plan``; light to import, the work is in rarefy.train.plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rarefy.cli import options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    plan = commands.add_parser("plan", help="what a recipe will take: FLOPs, memory, hours; nothing is written")
    plan.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, for example recipes/demo.yaml")
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: method.target=0.95"
    )
    plan.add_argument("--data", metavar="FOLDER", help="where the data set's files lie (data.folder)")
    plan.add_argument("--devices", type=int, nargs="+", default=[1], metavar="N", help="numbers of devices; default 1")
    plan.add_argument("--price", type=float, metavar="PRICE", help="of a device for an hour, in any currency")
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="between devices; default 12.5, 100 Gbit/s")
    options.add_json(plan)
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from rarefy import train
    from rarefy.train import plan

    recipe = train.load(arguments.recipe, options.recipe_changes(arguments))
    bandwidth = plan.BANDWIDTH if arguments.bandwidth is None else arguments.bandwidth
    made = plan.make(recipe, arguments.devices, price=arguments.price, bandwidth=bandwidth)
    print(json.dumps(made.to_dict()) if arguments.json else made.text())
    return 0
