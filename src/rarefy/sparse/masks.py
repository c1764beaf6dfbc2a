"""Exact, deterministic choice of the weights that live: ties go to the lower index, on every device and rank."""

from __future__ import annotations

from collections.abc import Sequence

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
    cost = torch.cat([flat.new_full((layer.numel(),), cost) for cost, layer in zip(costs, scores, strict=True)])
    order = flat.argsort(descending=True, stable=True)
    live = torch.zeros_like(flat, dtype=torch.bool)
    live[order] = cost[order].cumsum(0) <= budget + slack
    parts = torch.split(live, [layer.numel() for layer in scores])
    return [part.view(layer.shape) for part, layer in zip(parts, scores, strict=True)]
