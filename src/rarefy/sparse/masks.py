"""Exact, deterministic choice of the weights that live: ties go to the lower index, on every device and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Boolean mask, shaped as ``scores``, of exactly ``k`` largest values; among equal ones the first are taken.

    Raises ValueError when ``k`` is not in [0, scores.numel()].
    """
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k must be in [0, {scores.numel()}], the number of scores, got {k}")
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def within_budget(
    scores: Sequence[Tensor], costs: Sequence[float], budget: float, least: Sequence[int]
) -> list[Tensor]:
    """Masks of the best-scored weights over all layers whose costs add up to at most ``budget``.

    Args:
        scores: one tensor a layer; larger is better.
        costs: what one weight of each layer costs, > 0.
        budget: what all weights together may cost.
        least: how many weights each layer keeps whatever the others score (its own best ones).

    The next best weight is taken until the first that does not fit, so with equal costs exactly floor(budget / cost)
    weights live. Raises ValueError when the weights that must live alone cost more than the budget.
    """
    must = sum(cost * count for cost, count in zip(costs, least, strict=True))
    slack = 1e-9 * sum(cost * layer.numel() for cost, layer in zip(costs, scores, strict=True))
    if must > budget + slack:
        raise ValueError(f"the layers' floors alone cost {must:.6g}, more than the budget of {budget:.6g}")
    forced = [top_k(layer, count) for layer, count in zip(scores, least, strict=True)]
    flat = torch.cat([s.double().masked_fill(f, torch.inf).flatten() for s, f in zip(scores, forced, strict=True)])
    # In whole numbers, whose sums are the same in any order: those of floats are not on a GPU.
    unit = 2.0**61 / sum(cost * layer.numel() for cost, layer in zip(costs, scores, strict=True))
    whole = [
        torch.full((layer.numel(),), round(cost * unit), device=flat.device)
        for cost, layer in zip(costs, scores, strict=True)
    ]
    order = flat.argsort(descending=True, stable=True)
    live = torch.zeros_like(flat, dtype=torch.bool)
    live[order] = torch.cat(whole)[order].cumsum(0) <= round((budget + slack) * unit)
    parts = torch.split(live, [layer.numel() for layer in scores])
    return [part.view(layer.shape) for part, layer in zip(parts, scores, strict=True)]


def block_sum(scores: Tensor, block: int) -> Tensor:
    """(out, in, ...) -> (out, in / block, ...): the sum over each block of consecutive inputs."""
    if block == 1:
        return scores
    return scores.reshape(scores.shape[0], -1, block, *scores.shape[2:]).sum(2)


def block_expand(blocks: Tensor, block: int) -> Tensor:
    """(out, in / block, ...) -> (out, in, ...): what holds for a block, for each of its weights."""
    return blocks if block == 1 else blocks.repeat_interleave(block, dim=1)


def check_divisible(shapes: Mapping[str, Sequence[int]], width: int, what: str) -> None:
    """Raise ValueError for a layer whose inputs ``width`` does not divide; ``what`` names what is laid over them."""
    odd = {name: shape[1] for name, shape in shapes.items() if shape[1] % width}
    if odd:
        name, inputs = next(iter(odd.items()))
        raise ValueError(
            f"layer {name!r} has {inputs} inputs to an output, which {what} do not divide; pass exclude={list(odd)}"
        )


def best_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n best of every m consecutive inputs of an output: scores (out, in, ...), ties to the lower index."""
    groups = scores.reshape(scores.shape[0], -1, m, *scores.shape[2:]).movedim(2, -1)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return mask.movedim(-1, 2).flatten(1, 2)


def random_scores(shape: Sequence[int], *numbers: int) -> Tensor:
    """Uniform random numbers that follow from the numbers alone, the same on every device and rank.

    Made on the CPU; double, so that ties practically never happen.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:  # the splitmix64 finalizer over each
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(state >> 1), dtype=torch.float64)
