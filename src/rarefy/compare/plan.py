"""What is compared: a file that names a recipe, methods with their options, targets and seeds.

::

    name: fashion-mnist
    recipe: fashion-mnist.yaml           # beside this file; everything that the methods share
    seeds: 3                             # 0, 1, 2
    targets: [0.9, 0.95]
    budget: sparsity                     # what targets are of; or flops: shares of the dense network's; or ms: the
                                         # engine's milliseconds, of which each run measures its table (--jobs 1)
    changes: {schedule.epochs: 8}        # of the recipe, if any
    methods:
      dense: {name: dense}
      RigL: {name: rigl, drop_fraction: 0.3}
      GMP: {name: gmp, targets: [0.8, 0.9, 0.95, 0.98], seeds: 5}     # instead of those above
      2:4: {name: nm, n: 2, m: 4}        # no target: its options say how sparse it gets
      STR: {name: str, targets: [null]}  # no target though it could have one

A recipe itself will do too: then every method runs with its own defaults at the recipe's target, with one seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rarefy import _checks, sparse
from rarefy._names import unknown
from rarefy._yaml import read_yaml
from rarefy.train import Recipe
from rarefy.train import load as load_recipe
from rarefy.train.recipe import differences, parse

_KEYS = ("name", "recipe", "seeds", "targets", "budget", "changes", "methods")

#: A mistake is more likely than more runs of one kind.
_MOST_SEEDS = 10_000

#: What targets are of -> the methods' option.
BUDGETS = {"sparsity": "target", "flops": "target_flops", "ms": "target_ms"}


@dataclass(frozen=True)
class Job:
    """One run: ``label`` is the method's in the comparison; ``target`` is None for a method that takes none.

    A target is a sparsity, with ``budget`` "flops" a share of the dense network's inference FLOPs, and with "ms" the
    milliseconds of a call of the engine.
    """

    label: str
    target: float | None
    seed: int
    recipe: Recipe
    budget: str = "sparsity"

    @property
    def folder(self) -> str:
        """Name of the run's folder, unique in a comparison."""
        parts = [re.sub(r"[^A-Za-z0-9.+-]+", "-", self.label).strip("-")]
        parts += [] if self.target is None else [f"{self.target:g}"]
        return "_".join([*parts, f"seed{self.seed}"])


@dataclass(frozen=True)
class Comparison:
    """Everything that is to run, in the order of the file: target by target, seed by seed."""

    name: str
    source: Path
    jobs: tuple[Job, ...] = field(repr=False)
    budget: str = "sparsity"
    changes: tuple[str, ...] = ()

    def labels(self) -> list[str]:
        """List the methods' labels in the order of the file."""
        return list(dict.fromkeys(job.label for job in self.jobs))


def load(path: Path, changes: Sequence[str] = ()) -> Comparison:
    """Read a comparison and check all of it; ``changes`` are ``KEY=VALUE`` for the recipe (see ``rarefy train``).

    Raises ValueError that names what is wrong, FileNotFoundError without the file or its recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no comparison {str(path)!r}; see recipes/compare-fashion-mnist.yaml")
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold keys such as recipe, methods and targets, got {plain!r:.80}")
    if "recipe" not in plain:
        recipe = load_recipe(path, changes)
        target = recipe.method.options.get("target", 0.9)
        every: dict[str, Any] = {"dense": {"name": "dense"}, **{name: {"name": name} for name in sparse.list_methods()}}
        return replace(_comparison(recipe.name, path, recipe, every, [target], 1), changes=tuple(changes))
    for key in plain:
        if key not in _KEYS:
            raise ValueError(unknown(f"key in {path}:", str(key), _KEYS))
    given, beside = plain.get("changes") or {}, plain["recipe"]
    if not isinstance(given, dict) or not isinstance(beside, str):
        raise ValueError(
            f"{path}: recipe must be a file's name and changes a mapping, got {beside!r:.80}, {given!r:.80}"
        )
    own = [f"{key}={json.dumps(value, default=str)}" for key, value in given.items()]
    recipe = load_recipe(path.parent / beside, [*own, *changes])
    methods = plain.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise ValueError(f"{path}: methods must map labels to methods, such as 'RigL: {{name: rigl}}'")
    name = str(plain.get("name", path.stem))
    budget = plain.get("budget", "sparsity")
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise ValueError(unknown(f"budget in {path}:", str(budget), list(BUDGETS)))
    targets, seeds = plain.get("targets", [0.9]), plain.get("seeds", 3)
    found = _comparison(name, path, recipe, methods, targets, seeds, budget)
    return replace(found, changes=tuple(changes))


def _comparison(
    name: str,
    source: Path,
    recipe: Recipe,
    methods: Mapping[str, Any],
    targets: Sequence[float],
    seeds: int,
    budget: str = "sparsity",
) -> Comparison:
    base = recipe.to_dict()
    jobs = []
    for label, method in methods.items():
        if not isinstance(method, Mapping) or "name" not in method:
            raise ValueError(f"method {label!r} must be a mapping with a name, such as {{name: rigl}}, got {method!r}")
        options = {key: value for key, value in method.items() if key not in ("targets", "seeds")}
        if not isinstance(method["name"], str):
            raise ValueError(f"the name of method {label!r} must be text, got {method['name']!r:.80}")
        given = method.get("targets", targets)
        numbers = isinstance(given, list) and all(aim is None or type(aim) in (int, float) for aim in given)
        if not numbers or any(aim is not None and not abs(aim) < 1e9 for aim in given):
            raise ValueError(f"targets must be a list of numbers, got {given!r:.80} for {label!r}")
        aims: Sequence[float | None] = method.get("targets", targets) if _targeted(options) else (None,)
        for target in aims:
            aim = {} if target is None else {BUDGETS[budget]: target}
            for seed in range(_checks.whole(f"seeds of {label!r}", method.get("seeds", seeds), 1, _MOST_SEEDS)):
                parsed = parse({**base, "method": {**options, **aim}, "seed": base["seed"] + seed})
                if parsed.data.name == "translation":
                    raise ValueError(f"{name} compares by test accuracy, which a translator has not: rarefy train it")
                jobs.append(Job(str(label), target, seed, parsed, budget))
    folders = [job.folder for job in jobs]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"two runs of {name} would share the folder {twice!r}: give their methods other labels")
    order = {target: index for index, target in enumerate(dict.fromkeys(job.target for job in jobs))}
    return Comparison(name, source, tuple(sorted(jobs, key=lambda job: (order[job.target], job.seed))), budget)


def _targeted(options: Mapping[str, Any]) -> bool:
    name = options["name"]
    if name == "dense" or not options.keys().isdisjoint(BUDGETS.values()):
        return False
    if name not in sparse.list_methods():
        raise ValueError(unknown("method", str(name), ["dense", *sparse.list_methods()]))
    return sparse.list_methods(name, details=True)[name].targeted != "never"


def pending(comparison: Comparison, folder: Path) -> list[Job]:
    """The runs that are not finished yet. Raises ValueError where one in the folder is of another recipe."""
    for job in comparison.jobs:
        begun = folder / job.folder / "recipe.yaml"
        if begun.is_file():
            free = {"threads": None, "shard": None}
            old, new = ({**recipe.to_dict(), **free} for recipe in (load_recipe(begun), job.recipe))
            for key in {"folder", "workers"} & new["data"].keys():
                old["data"][key] = new["data"][key]
            changed = differences(old, new)
            if changed:
                raise ValueError(
                    f"{begun.parent} is a run of another recipe, which differs in {', '.join(changed)}: name another "
                    "folder for this comparison (--run), or delete that run"
                )
    return [job for job in comparison.jobs if not (folder / job.folder / "summary.json").is_file()]
