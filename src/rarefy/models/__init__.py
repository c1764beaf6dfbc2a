"""The networks that the published results are about, in plain PyTorch.

Each image network is a function that builds it; :func:`create` builds one by its name, as a recipe gives it, and those
of others too: ``timm:NAME``, and ``package.module:function`` for any function that returns a module. GNMT is a class;
:mod:`rarefy.models.search` translates with it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from torch import nn

from rarefy._names import unknown
from rarefy.models.cnn import fashion_cnn
from rarefy.models.gnmt import GNMT
from rarefy.models.mobilenet import mobilenet_v1
from rarefy.models.resnet import resnet18, resnet20, resnet50

__all__ = [
    "GNMT",
    "create",
    "fashion_cnn",
    "fitting",
    "is_reference",
    "mobilenet_v1",
    "names",
    "options",
    "resnet18",
    "resnet20",
    "resnet50",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (fashion_cnn, mobilenet_v1, resnet18, resnet20, resnet50)
}

_REFERENCE = re.compile(r"timm:[\w.-]+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def names() -> tuple[str, ...]:
    """List the names of this house's that :func:`create` knows, sorted."""
    return tuple(sorted(_MODELS))


def is_reference(name: str) -> bool:
    """Say whether a name has the form of a network of others: ``timm:NAME`` or ``package.module:function``."""
    return _REFERENCE.fullmatch(name) is not None


def options(name: str) -> tuple[str, ...]:
    """Return the options of the network of this name; what takes any more has them as ``**``.

    Raises as :func:`create` for a name that does not exist.
    """
    parameters = inspect.signature(_function(name)).parameters.values()
    return tuple("**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters)


def fitting(name: str, *, num_classes: int, in_channels: int) -> dict[str, int]:
    """Return those of these two that the network of this name takes, as options for :func:`create`."""
    if name.startswith("timm:"):
        return {"num_classes": num_classes, "in_chans": in_channels}
    known = options(name)
    given = {"num_classes": num_classes, "in_channels": in_channels}
    return {key: value for key, value in given.items() if key in known or (key == "num_classes" and "**" in known)}


def create(name: str, **arguments: Any) -> nn.Module:
    """Make a freshly initialised network by its name; the options are the arguments of the function of that name.

    Raises ValueError, naming the nearest right one, for a name or an option that does not exist, and for a function
    that does not take the options or, of others, returns no module; ImportError where its package is not installed.
    """
    known = options(name)
    for option in arguments:
        if option not in known and "**" not in known:
            raise ValueError(unknown(f"option of model {name!r}:", option, known))
    try:
        made = _function(name)(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        why = str(error).partition("\n")[0]  # PyTorch's errors go on with a stack of C++
        raise ValueError(f"{name} cannot be called with {arguments or 'no options'!s:.200}: {why:.400}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, got {type(made).__name__}")
    return made


def _function(name: str) -> Callable[..., nn.Module]:
    if name in _MODELS:
        return _MODELS[name]
    if not is_reference(name):
        raise ValueError(unknown("model", name, names()))
    place, _, inner = name.partition(":")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as missing:
        if place == "timm":
            raise ImportError(f"{name} needs {missing.name}: pip install timm") from missing
        raise ImportError(
            f"{name} needs the module {missing.name}: install it, or put its folder on PYTHONPATH (PYTHONPATH=. rarefy"
            " ... for a file here)"
        ) from missing
    if place == "timm":
        if not module.is_model(inner):
            raise ValueError(unknown("model of timm:", inner, module.list_models()))
        return partial(module.create_model, inner)
    try:
        found = reduce(getattr, inner.split("."), module)
    except AttributeError as error:
        public = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(unknown(f"function in {place}:", inner, public)) from error
    if not callable(found):
        raise ValueError(f"{name} must be a function that returns a torch.nn.Module, got {type(found).__name__}")
    return found
