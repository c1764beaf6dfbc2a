"""What a :class:`rarefy.engine.plan.Pointwise` step computes, in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine.functions import function_of
from rarefy.engine.plan import (
    ACTIVATIONS,
    MOST_INSTRUCTIONS,
    MOST_TERMS,
    OF_ONE,
    OF_TWO,
    Pointwise,
    Ref,
)


def _leaky(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x < 0, x * y, x)


def _elu(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x < 0, y * torch.expm1(x), x)


#: The operations of a :class:`Pointwise` step besides the activations.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div},
    **{"min": torch.minimum, "max": torch.maximum, "leaky": _leaky, "elu": _elu},
    **{"neg": torch.neg, "abs": torch.abs, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "exp": torch.exp},
    **{"log": torch.log, "softplus": F.softplus, "mish": F.mish},
}


def pointwise(step: Pointwise) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    """What computes an expression, as :func:`bind` gives it: the operator alone where there is one."""
    check_pointwise(step)
    constants, operands = step.split(), tuple(map(Ref, step.operands))
    if len(step.code) > 1:
        return functools.partial(_evaluate, step.code, constants), operands, {}
    ((operation, x, y),) = step.code
    terms: list[Any] = [*operands, *constants]
    if (
        y >= len(operands)
        and not terms[y].is_meta
        and terms[y].dim() == 0
        and operation in ("add", "sub", "mul", "div")
    ):
        terms[y] = terms[y].item()  # which PyTorch takes faster
    return _operation(operation), (terms[x], *([terms[y]] if y >= 0 else [])), {}


def _operation(operation: str) -> Callable[..., Tensor]:
    return OPERATIONS.get(operation) or function_of(operation)


def _evaluate(code: Sequence[tuple[str, int, int]], constants: Sequence[Tensor], *operands: Tensor) -> Tensor:
    terms = [*operands, *constants]
    for operation, x, y in code:
        terms.append(_operation(operation)(terms[x], *([terms[y]] if y >= 0 else [])))
    return terms[-1]


def check_pointwise(step: Pointwise) -> None:
    """Raise ValueError for an expression that is none."""
    given = len(step.operands) + len(step.sizes)
    if not (1 <= len(step.code) <= MOST_INSTRUCTIONS and 1 <= len(step.operands) <= given <= MOST_TERMS):
        raise ValueError(f"an expression has {len(step.code)} instructions and {given} terms")
    for index, (operation, x, y) in enumerate(step.code):
        two = operation in OF_TWO
        if not two and operation not in (*OF_ONE, *ACTIVATIONS):
            raise ValueError(f"there is no operation {operation!r:.80}")
        if not (0 <= x < given + index and (0 <= y < given + index if two else y == -1)):
            raise ValueError(f"instruction {index} reads terms {x!r:.80} and {y!r:.80}, which are not there")
