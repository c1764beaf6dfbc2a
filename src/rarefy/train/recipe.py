"""A recipe: everything that a run depends on, in one YAML file whose every key is checked before anything starts."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rarefy import models, sparse
from rarefy._names import unknown
from rarefy._yaml import parse_yaml, read_yaml
from rarefy.models import GNMT
from rarefy.sparse.budget import check_targets
from rarefy.sparse.families.targeted import Targeted
from rarefy.sparse.registry import METHODS

#: The largest size of a model that is taken for one, and the most layers.
_LARGEST, _MOST_LAYERS = 1 << 20, 1000


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
class Images:
    """Pictures by class, on disk.

    Attributes:
        name: "images".
        folder: class folders, tar shards or a data set of Hugging Face's; see :mod:`rarefy.data.images`.
        held_out: the split that is evaluated on, "val" or another one's name.
        size: side in pixels of what the network sees.
        crop: in evaluation, the share of a picture's shorter side that is seen.
        augment: "crop-flip" (random crops, half of them mirrored), "crop", or "none": what evaluation sees.
        scale: least and most share of the area that a random crop has.
        jitter: by how much at most brightness, contrast and saturation are changed, as a share.
        mixup: both parameters of the beta distribution that two pictures are mixed by; 0 mixes none.
        photograph: strength of the synthetic photographs that are made of drawings; 0 makes none.
        workers: processes that decode; null takes one for each core.
    """

    name: str = "images"
    folder: str | None = None
    held_out: str = "val"
    size: int = 224
    crop: float = 0.875
    augment: str = "crop-flip"
    scale: Sequence[float] = field(default_factory=lambda: [0.08, 1.0])
    jitter: float = 0.0
    mixup: float = 0.0
    photograph: float = 0.0
    workers: int | None = None


@dataclass(frozen=True)
class Translation:
    """Parallel text that is learned from.

    Attributes:
        name: "translation".
        folder: a folder of files in two languages, or a table: see :func:`rarefy.data.translation.load`.
        languages: from which to which.
        vocab_size: tokens of the byte-pair encoding of both.
        tokenizer: the file of an encoding, such as another run's tokenizer.json, in place of a new one.
        longest: tokens of a sentence at most, with its end; training leaves longer pairs out.
        train_size: only the first so many training pairs; null takes all.
    """

    name: str = "translation"
    folder: str | None = None
    languages: Sequence[str] = field(default_factory=lambda: ["en", "de"])
    vocab_size: int = 8000
    tokenizer: str | None = None
    longest: int = 60
    train_size: int | None = None


#: What describes the data of each name.
DATA: dict[str, type[Data] | type[Images] | type[Translation]] = {
    "fashion_mnist": Data,
    "images": Images,
    "translation": Translation,
}


@dataclass(frozen=True)
class Named:
    """Something chosen by name, and its own options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """How the weights move. ``norm_weight_decay`` is the weight decay of vectors: norms' scales and all biases but
    those of linear layers; ``clip_norm`` the largest norm of all gradients together, null for none; ``ema`` the decay
    of an exponential moving average of the weights, which is evaluated and written in their place, null for none.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    norm_weight_decay: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: passes over the training data.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches; of sentences it counts
            tokens, padding among them, on the longer side.
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
    """A run. ``precision`` is "fp32", or "bf16" or "fp16" (autocast); ``threads`` null leaves it to PyTorch;
    ``accelerate`` lets sparse layers run on kernels that pass over the zeros, on the CPU: see
    :func:`rarefy.sparse.accelerate`; ``shard`` splits the weights, their gradients and what optimizer and method
    remember over the processes (FSDP2), where otherwise each of them holds all (DDP); ``compile`` runs
    training steps, not evaluations, through ``torch.compile``.
    """

    name: str
    model: Named
    method: Named = field(default_factory=lambda: Named("dense"))
    data: Data | Images | Translation = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    precision: str = "fp32"
    channels_last: bool = True
    threads: int | None = None
    accelerate: bool = False
    shard: bool = False
    compile: bool = False

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
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ValueError(f"{path} must hold keys such as name, model and method, got {plain!r:.80}")
    for change in changes:
        _set(plain, change)
    plain.setdefault("name", path.stem)
    return parse(plain)


def parse(plain: Mapping[str, Any]) -> Recipe:
    """Check the recipe that a mapping (as from YAML) describes, and return it. Raises ValueError as :func:`load`."""
    recipe = _build(Recipe, plain, "")
    _check(recipe)
    return recipe


def build(model: Named, **fitting: int) -> nn.Module:
    """A recipe's model, freshly initialised; ``fitting`` are options that the data gives where the recipe does not."""
    taken = models.fitting(model.name, **fitting)
    return models.create(model.name, **{**taken, **model.options})


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
    plain[last] = parse_yaml(value, f"--set {change:.80}: {value!r:.80}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two recipes as mappings: ``["schedule.epochs (8 there, 9 here)"]``."""
    found = []
    for key in {**old, **new}:
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{where}{key}.")
        elif one != other:
            found.append(f"{where}{key} ({one!r} there, {other!r} here)")
    return found


T = TypeVar("T")


def _build(cls: type[T], plain: Any, where: str) -> T:
    if cls is Named:
        return typing.cast(T, _named(plain, where))
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where or 'the recipe'} must be a mapping of keys, got {_shown(plain)}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in plain:
        if key not in known:
            raise ValueError(_unknown_key(str(key), where, known))
    for key, f in known.items():
        if key not in plain and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where or 'the recipe'} lacks {key!r}")
    kinds = typing.get_type_hints(cls)
    return cls(**{key: _value(kinds[key], value, f"{where}.{key}".lstrip(".")) for key, value in plain.items()})


def _named(plain: Any, where: str) -> Named:
    if not isinstance(plain, Mapping) or not isinstance(plain.get("name"), str):
        raise ValueError(f"{where} needs a name, such as `{where}: {{name: ...}}`, got {_shown(plain)}")
    name = plain["name"]
    if where == "model" and ":" in name:
        # Its module is imported when the model is made: reading a recipe runs no code of others.
        if not models.is_reference(name):
            raise ValueError(
                f"model.name must be a network of rarefy's, timm:NAME or package.module:function, got {name!r:.80}"
            )
        return Named(name, {str(key): value for key, value in plain.items() if key != "name"})
    if where == "model":
        _one_of("model.name", name, [*models.names(), "gnmt"])
        kinds = typing.get_type_hints(GNMT.__init__ if name == "gnmt" else getattr(models, name))
        known = set(kinds) - {"return", "vocab_size", "padding"}
    else:
        _one_of("method.name", name, ["dense", *sparse.list_methods()])
        kinds, known = {}, set()
        if name != "dense":
            kinds = typing.get_type_hints(METHODS[name])
            known = set(sparse.options(name)) - {"example_input", "latency", "total_steps"}
    options = {}
    for key, value in plain.items():
        if key != "name":
            _one_of(f"option of {where} {name!r}", str(key), sorted(known))
            options[key] = _value(kinds[key], value, f"{where}.{key}")
    return Named(name, options)


def _unknown_key(key: str, where: str, known: Mapping[str, object]) -> str:
    message = unknown(f"key in {where or 'the recipe'}:", key, known)
    if "did you mean" not in message:
        kinds = typing.get_type_hints(Recipe)
        homes = ["", *(section for section, kind in kinds.items() if is_dataclass(kind) and kind is not Named)]
        for home in homes:
            if key in {f.name for f in fields(kinds.get(home, Recipe))}:
                right = f"{home}.{key}" if home else key
                return f"unknown key in {where or 'the recipe'}: {key!r}; did you mean {right!r}, counted from the top?"
    return message


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
    Sequence: "a list",
    Mapping: "a mapping",
}


def _value(kind: Any, value: Any, where: str) -> Any:
    if where == "data":
        name = value.get("name", Data.name) if isinstance(value, Mapping) else Data.name
        if not isinstance(name, str):
            raise ValueError(f"data.name must be text, got {name!r:.80}")
        _one_of("data.name", name, sorted(DATA))
        kind = DATA[name]
    if is_dataclass(kind):
        return _build(typing.cast(type[Any], kind), value, where)
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for one in allowed:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _converted(one, value)
    names = " or ".join(_KINDS[typing.get_origin(one) or one] for one in allowed)
    raise ValueError(f"{where} must be {names}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value as a message has it; Python writes no numbers of more than 4300 digits."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number of thousands of digits"


def _converted(kind: Any, value: Any) -> Any:
    """The value as this type; TypeError or ValueError if it is of another."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence and isinstance(value, list):
        return [_converted(inner[0], item) for item in value]
    if typing.get_origin(kind) is Mapping and isinstance(value, Mapping):
        return {_converted(inner[0], key): _converted(inner[1], item) for key, item in value.items()}
    # YAML reads 5e-4 as text: its floats want a dot.
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    if inner or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _one_of(where: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(unknown(f"{where}:", value, known))


def _check(recipe: Recipe) -> None:
    def require(ok: bool, where: str, expected: str, value: object) -> None:
        if not ok:
            raise ValueError(f"{where} must be {expected}, got {_shown(value)}")

    def at_least(least: float, where: str, value: float | None) -> None:
        expected = f"at least {least}" + (", and finite" if isinstance(least, float) else "")
        require(value is None or least <= value < math.inf, where, expected, value)

    schedule, optimizer, data = recipe.schedule, recipe.optimizer, recipe.data
    if isinstance(data, Translation):
        require(recipe.model.name == "gnmt", "model.name", "gnmt for data.name: translation", recipe.model.name)
        require(data.folder is not None, "data.folder", "a table or a folder of parallel text", data.folder)
        languages = len(data.languages) == 2 and data.languages[0] != data.languages[1]
        require(languages, "data.languages", "two, such as [en, de]", data.languages)
        require(4 < data.vocab_size < 1 << 20, "data.vocab_size", "in (4, 2^20)", data.vocab_size)
        fits = 2 <= data.longest <= schedule.batch_size // max(1, schedule.accumulate)
        expected = "in [2, schedule.batch_size / accumulate], so that a sentence fits into a batch of tokens"
        require(fits, "data.longest", expected, data.longest)
    else:
        require(recipe.model.name != "gnmt", "data.name", "translation for model.name: gnmt", data.name)
    if isinstance(data, Data):
        _one_of("data.augment", data.augment, ["none", "crop-flip"])
        at_least(1, "data.train_size", data.train_size)
    if isinstance(data, Images):
        _check_images(data, require)
    if isinstance(data, Translation):
        at_least(1, "data.train_size", data.train_size)
    _one_of("optimizer.name", optimizer.name, ["sgd", "adamw"])
    _one_of("precision", recipe.precision, ["fp32", "bf16", "fp16"])
    for key, number in (("seed", recipe.seed), ("schedule.epochs", schedule.epochs)):
        require(abs(number) < 1 << 31, key, "below 2^31", number)
    require(schedule.batch_size < 1 << 31, "schedule.batch_size", "below 2^31", schedule.batch_size)
    folder = recipe.name not in ("", ".", "..") and not set(recipe.name) & set("/\\\0")
    require(folder, "name", "a folder's name", recipe.name)
    for option, value in () if ":" in recipe.model.name else recipe.model.options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and option != "dropout"
        require(not number or 0 < value < math.inf, f"model.{option}", "above 0, and finite", value)
        most = _MOST_LAYERS if option == "num_layers" else _LARGEST
        require(not number or value <= most, f"model.{option}", f"at most {most}", value)
    if recipe.method.name != "dense" and issubclass(METHODS[recipe.method.name], Targeted):
        # Here, since milliseconds are measured before the method is made.
        check_targets({key: recipe.method.options.get(key) for key in ("target", "target_flops", "target_ms")})
    at_least(1, "schedule.epochs", schedule.epochs)
    at_least(1, "schedule.batch_size", schedule.batch_size)
    fits = schedule.accumulate >= 1 and schedule.batch_size % schedule.accumulate == 0
    require(fits, "schedule.accumulate", f"a divisor of batch_size={schedule.batch_size}", schedule.accumulate)
    warmup, smoothing = schedule.warmup_epochs, schedule.label_smoothing
    require(0 <= warmup < schedule.epochs, "schedule.warmup_epochs", f"in [0, epochs={schedule.epochs})", warmup)
    require(0 <= smoothing < 1, "schedule.label_smoothing", "in [0, 1)", smoothing)
    require(0 < optimizer.lr < math.inf, "optimizer.lr", "above 0, and finite", optimizer.lr)
    require(0 <= optimizer.momentum < 1, "optimizer.momentum", "in [0, 1)", optimizer.momentum)
    nesterov = not optimizer.nesterov or (optimizer.name == "sgd" and optimizer.momentum > 0)
    require(nesterov, "optimizer.nesterov", "false without SGD's momentum", optimizer.nesterov)
    at_least(0.0, "optimizer.weight_decay", optimizer.weight_decay)
    at_least(0.0, "optimizer.norm_weight_decay", optimizer.norm_weight_decay)
    clip = optimizer.clip_norm
    require(clip is None or 0 < clip < math.inf, "optimizer.clip_norm", "above 0, and finite, or null", clip)
    ema = optimizer.ema
    require(ema is None or 0 < ema < 1, "optimizer.ema", "in (0, 1), or null", ema)
    require(recipe.threads is None or 1 <= recipe.threads <= 1024, "threads", "in [1, 1024], or null", recipe.threads)
    sparse_steps = not recipe.accelerate or (recipe.method.name != "dense" and recipe.precision == "fp32")
    require(sparse_steps, "accelerate", "false for the method dense, and without precision: fp32", recipe.accelerate)
    for key in ("shard", "compile"):
        require(not (recipe.accelerate and getattr(recipe, key)), key, "false with accelerate: true", True)
    # Gathering breaks every graph, and what loops over blocks is not compiled at all then.
    require(not (recipe.shard and recipe.compile), "compile", "false with shard: true", recipe.compile)
    require(not recipe.shard or recipe.precision != "fp16", "shard", "false in precision: fp16", recipe.shard)


def _check_images(data: Images, require: Callable[[bool, str, str, object], None]) -> None:
    require(data.folder is not None, "data.folder", "a folder with train and val", data.folder)
    place = data.held_out not in ("", ".", "..", "train") and not set(data.held_out) & set("/\\\0*?[]")
    require(place, "data.held_out", "a split to evaluate on, such as val", data.held_out)
    require(1 <= data.size <= 4096, "data.size", "in [1, 4096]", data.size)
    require(0 < data.crop <= 1, "data.crop", "in (0, 1]", data.crop)
    _one_of("data.augment", data.augment, ["none", "crop", "crop-flip"])
    shares = len(data.scale) == 2 and 0 < data.scale[0] <= data.scale[-1] <= 1
    require(shares, "data.scale", "two shares such as [0.08, 1.0]", data.scale)
    require(0 <= data.jitter <= 1, "data.jitter", "in [0, 1]", data.jitter)
    require(0 <= data.mixup < math.inf, "data.mixup", "at least 0, and finite", data.mixup)
    require(0 <= data.photograph < math.inf, "data.photograph", "at least 0, and finite", data.photograph)
    eights = not data.photograph or data.size % 8 == 0
    require(eights, "data.size", "a multiple of 8 for photographs", data.size)
    workers = data.workers is None or 0 <= data.workers <= 1024
    require(workers, "data.workers", "in [0, 1024], or null", data.workers)
