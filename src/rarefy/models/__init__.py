"""The networks that the published results are about, in plain PyTorch.

Each image network is a function that builds it; :func:`create` builds one by its name, as a recipe gives it. GNMT is a
class; :mod:`rarefy.models.search` translates with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from rarefy._names import unknown
from rarefy.models.cnn import fashion_cnn
from rarefy.models.gnmt import GNMT
from rarefy.models.mobilenet import mobilenet_v1
from rarefy.models.resnet import resnet20, resnet50

__all__ = ["GNMT", "create", "fashion_cnn", "mobilenet_v1", "names", "options", "resnet20", "resnet50"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (fashion_cnn, mobilenet_v1, resnet20, resnet50)
}


def names() -> tuple[str, ...]:
    """List the names that :func:`create` knows, sorted."""
    return tuple(sorted(_MODELS))


def options(name: str) -> tuple[str, ...]:
    """Return the options of the network of this name.

    Raises ValueError, naming the nearest right one, if there is none.
    """
    if name not in _MODELS:
        raise ValueError(unknown("model", name, names()))
    return tuple(inspect.signature(_MODELS[name]).parameters)


def create(name: str, **arguments: Any) -> nn.Module:
    """Make a freshly initialised network by its name; the options are the arguments of the function of that name.

    Raises ValueError, naming the nearest right one, for a name or an option that does not exist.
    """
    known = options(name)
    for option in arguments:
        if option not in known:
            raise ValueError(unknown(f"option of model {name!r}:", option, known))
    return _MODELS[name](**arguments)
