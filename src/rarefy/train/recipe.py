"""A recipe: everything that a run depends on, in one YAML file whose every key is checked before anything starts."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rarefy import models, sparse
from rarefy._names import unknown


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        name: "fashion_mnist".
        folder: where its files lie; null looks in the usual places and fetches it if need be.
        train_size: only the first so many training images; null takes all.
        augment: "none", or "crop-flip": shifts by up to two pixels and mirror images.
    """

    name: str = "fashion_mnist"
    folder: str | None = None
    train_size: int | None = None
    augment: str = "none"


@dataclass(frozen=True)
class Named:
    """Something chosen by name, and its own options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """How the weights move. ``norm_weight_decay`` is the weight decay of vectors: norms' scales and all biases but
    those of linear layers.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    norm_weight_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: passes over the training images.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches.
        accumulate: micro-batches an optimizer step.
        warmup_epochs: the learning rate rises linearly for so long, then falls to 0 on a half cosine.
        label_smoothing: in [0, 1).
    """

    epochs: int = 8
    batch_size: int = 128
    accumulate: int = 1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A run. ``precision`` is "no" (float32), "bf16" or "fp16" (autocast); ``threads`` null leaves it to PyTorch."""

    name: str
    model: Named
    method: Named = field(default_factory=lambda: Named("dense"))
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    precision: str = "no"
    channels_last: bool = True
    threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it would stand in a file, every default written out."""
        plain = asdict(self)
        for key in ("model", "method"):
            plain[key] = {"name": plain[key]["name"], **plain[key]["options"]}
        return plain


def load(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, change it by ``KEY=VALUE`` (``method.target=0.95``, values in YAML), and check all of it.

    Raises ValueError that names the key and the nearest right one; FileNotFoundError without the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; recipes are YAML files such as recipes/demo.yaml")
    try:
        plain = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold keys such as name, model and method, got {type(plain).__name__}")
    for change in changes:
        _set(plain, change)
    plain.setdefault("name", path.stem)
    return parse(plain)


def parse(plain: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping (as from YAML) describes, checked. Raises ValueError as :func:`load`."""
    recipe = _build(Recipe, plain, "")
    _check(recipe)
    return recipe


def _set(plain: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    if not equals or not path:
        raise ValueError(f"--set takes KEY=VALUE, such as method.target=0.95, got {change!r}")
    *parents, last = path.split(".")
    for parent in parents:
        inner = plain.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {change}: {parent!r} holds {inner!r}, not keys")
        plain = inner
    plain[last] = yaml.safe_load(value)


T = TypeVar("T")


def _build(cls: type[T], plain: Any, where: str) -> T:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where or 'the recipe'} must be a mapping of keys, got {plain!r}")
    plain = dict(plain)
    if cls is Named:
        if not isinstance(plain.get("name"), str):
            raise ValueError(f"{where} needs a name, such as `{where}: {{name: ...}}`, got {plain!r}")
        return typing.cast(T, Named(plain.pop("name"), plain))
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in plain:
        if key not in known:
            raise ValueError(unknown(f"key in {where or 'the recipe'}:", str(key), known))
    for key, f in known.items():
        if key not in plain and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where or 'the recipe'} lacks {key!r}")
    kinds = typing.get_type_hints(cls)
    return cls(**{key: _value(kinds[key], value, f"{where}.{key}".lstrip(".")) for key, value in plain.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value, where)
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed:
        if isinstance(value, str):  # YAML reads 5e-4 as text: its floats want a dot
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("null" if a is type(None) else a.__name__ for a in allowed)
        raise ValueError(f"{where} must be {names}, got {value!r}")
    return value


def _check(recipe: Recipe) -> None:
    def one_of(where: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(unknown(f"{where}:", value, known))

    def require(ok: bool, where: str, expected: str, value: object) -> None:
        if not ok:
            raise ValueError(f"{where} must be {expected}, got {value}")

    schedule, optimizer, data = recipe.schedule, recipe.optimizer, recipe.data
    one_of("data.name", data.name, ["fashion_mnist"])
    one_of("data.augment", data.augment, ["none", "crop-flip"])
    one_of("optimizer.name", optimizer.name, ["sgd", "adamw"])
    one_of("precision", recipe.precision, ["no", "bf16", "fp16"])
    one_of("model.name", recipe.model.name, models.names())
    for option in recipe.model.options:
        one_of(f"option of model {recipe.model.name!r}", option, models.options(recipe.model.name))
    one_of("method.name", recipe.method.name, ["dense", *sparse.names()])
    for option in recipe.method.options:
        own = sorted(sparse.options(recipe.method.name) - {"example_input", "total_steps"})
        one_of(f"option of method {recipe.method.name!r}", option, own if recipe.method.name != "dense" else [])
    require(bool(recipe.name) and "/" not in recipe.name, "name", "a folder's name", repr(recipe.name))
    require(data.train_size is None or data.train_size > 0, "data.train_size", "above 0", data.train_size)
    require(schedule.epochs >= 1, "schedule.epochs", "at least 1", schedule.epochs)
    require(schedule.batch_size >= 1, "schedule.batch_size", "at least 1", schedule.batch_size)
    fits = schedule.accumulate >= 1 and schedule.batch_size % schedule.accumulate == 0
    require(fits, "schedule.accumulate", "a divisor of batch_size", schedule.accumulate)
    require(
        0 <= schedule.warmup_epochs < schedule.epochs,
        "schedule.warmup_epochs",
        "in [0, epochs)",
        schedule.warmup_epochs,
    )
    require(0 <= schedule.label_smoothing < 1, "schedule.label_smoothing", "in [0, 1)", schedule.label_smoothing)
    require(optimizer.lr > 0, "optimizer.lr", "above 0", optimizer.lr)
    require(recipe.threads is None or recipe.threads >= 1, "threads", "at least 1, or null", recipe.threads)
