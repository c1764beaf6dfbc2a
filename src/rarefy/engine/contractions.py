"""Sums over products of two tensors, however they are written, as reshapes and one matrix product.

Where one operand is a constant, the product is a layer, and what is done to the constant is done once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _permuted(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x if list(axes) == sorted(axes) else x.permute(tuple(axes))


def _axes(term: str, letters: str) -> list[int]:
    return [term.index(letter) for letter in letters]


def _sizes(x: Tensor, term: str, letters: str) -> list[Any]:
    return [x.shape[axis] for axis in _axes(term, letters)]


def _flat(x: Tensor, kept: int, groups: Sequence[int]) -> Tensor:
    """The tensor with the axes behind the first ``kept`` joined in groups of so many; a group of none is of size 1."""
    shape, at = list(x.shape[:kept]), kept
    for group in groups:
        size: Any = 1
        for axis in range(at, at + group):
            size = size * x.shape[axis]
        shape.append(size)
        at += group
    return x if all(group == 1 for group in groups) else x.reshape(shape)


def _spelled(terms: Sequence[str], ranks: Sequence[int]) -> list[str] | None:
    """The two operands and the result with letters in the place of an ellipsis; None where it means two things."""
    free = [letter for letter in ascii_letters if not any(letter in term for term in terms)]
    missing = {rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=False) if "..." in term}
    if len(missing) > 1:
        return None
    return [term.replace("...", "".join(free[: max(missing, default=0)])) for term in terms]


def einsum(equation: str, tensors: Sequence[Tensor], path: Sequence[int] | None = None) -> Any:
    """``aten::einsum`` of two operands as :func:`torch.nn.functional.linear` or a batched product; others stay."""
    found = re.fullmatch(r"([.a-zA-Z]+),([.a-zA-Z]+)->([.a-zA-Z]*)", equation.replace(" ", ""))
    if found is None or len(tensors) != 2:
        return NotImplemented
    terms = _spelled(found.groups(), [x.dim() for x in tensors])
    if terms is None or any(len({*term}) != len(term) or "." in term for term in terms):
        return NotImplemented
    made = terms.pop()
    if any({*own} - {*other, *made} for own, other in (terms, terms[::-1])) or {*made} - {*terms[0], *terms[1]}:
        return NotImplemented
    # The matrix is the one without a size that is only known when it runs.
    fixed = [all(isinstance(size, int) for size in x.shape) for x in tensors]
    (x, of_x), (weight, of_w) = zip(tensors, terms, strict=True)
    if fixed[0] and (not fixed[1] or weight.dim() > x.dim()):
        x, of_x, weight, of_w = weight, of_w, x, of_x
    batch = "".join(letter for letter in of_x if letter in of_w and letter in made)
    inner = "".join(letter for letter in of_x if letter in of_w and letter not in made)
    rows, columns = ("".join(letter for letter in term if letter not in batch + inner) for term in (of_x, of_w))
    if not inner or not rows:
        return NotImplemented
    order = rows[:-1] + batch + rows[-1:]  # as matmul has it: the matrices of a batch are broadcast over rows
    sizes = [*_sizes(x, of_x, order), *_sizes(weight, of_w, columns)]
    x = _flat(_permuted(x, _axes(of_x, order + inner)), len(order), [len(inner)])
    if not batch:
        y = F.linear(x, _flat(_permuted(weight, _axes(of_w, columns + inner)), 0, [len(columns), len(inner)]))
    else:
        weight = _permuted(weight, _axes(of_w, batch + inner + columns))
        y = torch.matmul(x, _flat(weight, len(batch), [len(inner), len(columns)]))
    return _permuted(y if len(columns) == 1 else y.reshape(sizes), _axes(order + columns, made))


def tensordot(x: Tensor, y: Tensor, dims_x: Sequence[int], dims_y: Sequence[int]) -> Any:
    """``aten::tensordot`` as the einsum that it is."""
    letters = iter(ascii_letters)
    of_x = [next(letters) for _ in range(x.dim())]
    of_y = [next(letters) for _ in range(y.dim())]
    for i, j in zip(dims_x, dims_y, strict=True):
        of_y[j] = of_x[i]
    made = [letter for letter in (*of_x, *of_y) if not (letter in of_x and letter in of_y)]
    return einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(made)}", (x, y))


def inner(x: Tensor, y: Tensor) -> Any:
    """``aten::inner``: over the last axes."""
    return tensordot(x, y, [x.dim() - 1], [y.dim() - 1]) if x.dim() and y.dim() else NotImplemented


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What contractions are made of, as ``run_decompositions`` takes it."""
    aten = torch.ops.aten
    return {
        aten.einsum.default: einsum,
        aten.tensordot.default: tensordot,
        aten.inner.default: inner,
    }
