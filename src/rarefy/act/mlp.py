"""Multilayer perceptrons of a gated unit, ``down(act(gate(x)) * up(x))``, known by how their forward is written."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

# as ast.unparse writes them, with the names of the input and of the children
_TWO = re.compile(
    r"(?:(?P<y>\w+) = |return )self\.(?P<down>\w+)\("
    r"(?:self\.(?P<act>\w+)\(self\.(?P<gate>\w+)\((?P<x>\w+)\)\) \* self\.(?P<up>\w+)\((?P=x)\)"
    r"|self\.(?P<up2>\w+)\((?P<x2>\w+)\) \* self\.(?P<act2>\w+)\(self\.(?P<gate2>\w+)\((?P=x2)\)\))"
    r"\)(?:\nreturn (?P=y))?"
)
_ONE = re.compile(
    r"(?P<h>\w+) = self\.(?P<gate>\w+)\((?P<x>\w+)\)\n"
    r"(?P<g>\w+), (?P<u>\w+) = (?P=h)\.chunk\(2, dim=-1\)\n"
    r"(?P<y>\w+) = (?:(?P=u) \* self\.(?P<act>\w+)\((?P=g)\)|self\.(?P<act2>\w+)\((?P=g)\) \* (?P=u))\n"
    r"return self\.(?P<down>\w+)\((?P=y)\)"
)


class Mlp(NamedTuple):
    """The names of the children; ``up`` is "" where ``gate`` gives both halves side by side.

    ``up_first`` says which of the two is called first, ``argument`` is the name of the forward's.
    """

    gate: str
    up: str
    act: str
    down: str
    up_first: bool
    argument: str


def read(module: nn.Module) -> Mlp | None:
    """Return how a module is such a perceptron, or None."""
    found = form_of(type(module).forward)
    names = () if found is None else (found.gate, found.up or found.gate, found.act, found.down)
    return found if names and all(name in module._modules for name in names) else None


@cache
def form_of(forward: Callable[..., Any]) -> Mlp | None:
    """Return how a forward is written, or None where it is no such perceptron's."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):  # there is no source to be had
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2:
        return None
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    text = "\n".join(ast.unparse(each) for each in body)
    owner, argument = (each.arg for each in tree.args.args)
    match = (_TWO.fullmatch(text) or _ONE.fullmatch(text)) if owner == "self" else None
    if match is None:
        return None
    names = match.groupdict()
    act, gate = names["act"] or names["act2"], names["gate"] or names["gate2"]
    up = names.get("up") or names.get("up2") or ""
    if argument not in (names["x"], names.get("x2")):
        return None
    return Mlp(gate, up, act, names["down"], bool(names.get("up2")), argument)
