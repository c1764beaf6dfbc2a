"""Exact, deterministic choice of the weights that live: ties go to the lower index, on every device and rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rarefy._prices import Prices
from rarefy.sparse.layers import Layer
from rarefy.sparse.shards import Shard, shared_group, total

#: Of how many consecutive outputs and inputs the weights live and die together.
Block = tuple[int, int]


def top_k(scores: Tensor, k: int, shard: Shard | None = None) -> Tensor:
    """Boolean mask, shaped as ``scores``, of exactly ``k`` largest values; among equal ones the first are taken.

    With ``shard`` the scores are this process's part of a layer, and ``k`` is of all parts together.

    Raises ValueError when ``k`` is not in [0, scores.numel()].
    """
    if shard is not None:
        return top_k_each([scores], [k], [shard])[0]
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k must be in [0, {scores.numel()}], the number of scores, got {k}")
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def top_k_each(scores: Sequence[Tensor], counts: Sequence[int], shards: Sequence[Shard | None]) -> list[Tensor]:
    """:func:`top_k` of every layer, with as few messages as of one."""
    if shared_group(shards) is None:
        return [top_k(layer, k) for layer, k in zip(scores, counts, strict=True)]
    return _best_together(scores, [Prices.one(1, 1 << 62)] * len(scores), counts, shards)


def within_budget(
    scores: Sequence[Tensor],
    prices: Sequence[Prices],
    budget: float,
    least: Sequence[int],
    shards: Sequence[Shard | None] | None = None,
) -> list[Tensor]:
    """Masks of the best-scored weights over all layers whose costs add up to at most ``budget``.

    Args:
        scores: one tensor a layer; larger is better.
        prices: what the weights of each layer cost, the best one first.
        budget: what all weights together may cost.
        least: how many weights each layer keeps whatever the others score (its own best ones).
        shards: the part of each layer that the scores are of; None where all are whole.

    The next best weight is taken until the first that does not fit, so with one price exactly floor(budget / price)
    weights live. Raises ValueError when the weights that must live alone cost more than the budget.
    """
    parts: Sequence[Shard | None] = [None] * len(scores) if shards is None else shards
    whole = sum(each.cost(each.size) for each in prices)
    must = sum(each.cost(count) for each, count in zip(prices, least, strict=True))
    slack = 1e-9 * whole
    if must > budget + slack:
        raise ValueError(f"the layers' floors alone cost {must:.6g}, more than the budget of {budget:.6g}")
    forced = top_k_each(scores, least, parts)
    ranked = [s.double().masked_fill(f, torch.inf) for s, f in zip(scores, forced, strict=True)]
    # In whole numbers, whose sums are the same in any order: those of floats are not on a GPU.
    unit = 2.0**61 / whole
    prices, purse = [each.in_units(unit) for each in prices], round((min(budget, whole) + slack) * unit)
    if shared_group(parts) is not None:
        return _best_together(ranked, prices, [purse], parts)
    flat = torch.cat([layer.flatten() for layer in ranked])
    order = flat.argsort(descending=True, stable=True)
    price = torch.cat([_price_of_each(layer, each) for layer, each in zip(ranked, prices, strict=True)])
    live = torch.zeros_like(flat, dtype=torch.bool)
    live[order] = price[order].cumsum(0) <= purse
    pieces = torch.split(live, [layer.numel() for layer in scores])
    return [piece.view(layer.shape) for piece, layer in zip(pieces, scores, strict=True)]


def _price_of_each(scores: Tensor, prices: Prices) -> Tensor:
    """The price of each weight of a layer, flat, when the best are taken first; in whole numbers."""
    flat, each = scores.flatten(), torch.tensor(prices.each, device=scores.device)
    if len(prices.each) == 1:
        return each.expand(flat.numel())
    lengths = torch.tensor([end - begun for begun, end in pairwise((0, *prices.ends))])
    found = torch.empty(flat.numel(), dtype=each.dtype, device=flat.device)
    found[flat.argsort(descending=True, stable=True)] = each.repeat_interleave(lengths.to(flat.device))
    return found


def _cost_of(counts: Tensor, prices: Prices) -> Tensor:
    """What each of these numbers of weights costs; in whole numbers."""
    cost, begun = torch.zeros_like(counts), 0
    for end, price in zip(prices.ends, prices.each, strict=True):
        cost += int(price) * (counts.clamp(max=end) - begun).clamp(min=0)
        begun = end
    return cost


def _best_together(
    scores: Sequence[Tensor], prices: Sequence[Prices], purses: Sequence[int], shards: Sequence[Shard | None]
) -> list[Tensor]:
    """What :func:`within_budget` chooses, where processes hold parts; with a purse for all layers, or one for each.

    No process sees another's scores. The last score that is taken is found byte by byte: each of eight rounds sums how
    many have which next byte.
    """
    group, device = shared_group(shards), scores[0].device
    keys = [_ordered(layer.double()) for layer in scores]
    purse = torch.tensor(purses, device=device).unsqueeze(1)
    live = torch.zeros(len(keys), 1, dtype=torch.int64, device=device)  # above the bytes found so far
    taken = [torch.zeros_like(key, dtype=torch.bool) for key in keys]  # which they are, here
    edge = [torch.ones_like(key, dtype=torch.bool) for key in keys]  # equal to them
    for shift in range(56, -8, -8):
        byte = [(key >> shift) & 255 for key in keys]
        counts = torch.stack([b[e].bincount(minlength=256) for b, e in zip(byte, edge, strict=True)])
        counts = total(counts, shards)
        above = live + counts.flip(1).cumsum(1).flip(1) - counts  # how many have a larger byte
        costs = torch.stack([_cost_of(row, each) for row, each in zip(above, prices, strict=True)])
        if len(purses) == 1:
            costs = costs.sum(0, keepdim=True)
        # the least byte above which everything fits
        found = (costs > purse).sum(1, keepdim=True).expand(len(keys), 1)
        live = above.gather(1, found)
        for index, (b, least) in enumerate(zip(byte, found, strict=True)):
            taken[index] |= edge[index] & (b > least)
            edge[index] &= b == least
    # Of the equal ones at the edge the first fit, by layer, and in it by process and index.
    here = torch.stack([equal.sum() for equal in edge])
    parts = [torch.empty_like(here) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, here, group=group)
    rank, numbers = torch.distributed.get_rank(group), torch.stack(parts, 1).tolist()
    before, full = [int(count) for count in live], False
    spent = [int(each.cost(count)) for each, count in zip(prices, before, strict=True)]
    left = [purses[0] - sum(spent)] if len(purses) == 1 else [p - s for p, s in zip(purses, spent, strict=True)]
    for index, (equal, layers, shard) in enumerate(zip(edge, numbers, shards, strict=True)):
        whose, there = index if len(purses) > 1 else 0, before[index]
        split = layers if shard is not None else [int(here[index])]
        fit = 0 if full else min(sum(split), prices[index].affordable(there, left[whose]))
        full = len(purses) == 1 and (full or fit < sum(split))
        left[whose] -= int(prices[index].cost(there + fit) - prices[index].cost(there))
        mine = fit - sum(split[:rank]) if shard is not None else fit
        taken[index] |= ((equal.flatten().cumsum(0) <= max(mine, 0)) & equal.flatten()).view(equal.shape)
    return taken


def _ordered(scores: Tensor) -> Tensor:
    """Doubles as int64 whose bytes, read without a sign, are in the same order; -0 and 0 are equal, NaN is largest."""
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).contiguous().view(torch.int64)
    return torch.where(bits < 0, bits.bitwise_not(), bits.bitwise_xor(-(2**63)))


def count_all(masks: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[int]:
    """How many of each layer, over all processes that hold a part of it."""
    return [int(count) for count in total(torch.stack([mask.sum() for mask in masks]), shards).tolist()]


def means(values: Sequence[Tensor], shards: Sequence[Shard | None] | None = None) -> list[float]:
    """The mean of each layer's numbers; with ``shards`` over all processes that hold a part of them."""
    found = torch.stack([torch.stack([v.double().sum(), v.new_tensor(v.numel()).double()]) for v in values])
    sums = found if shards is None else total(found, shards)
    return [part / count for part, count in sums.tolist()]


def least_kept(scores: Sequence[Tensor], masks: Sequence[Tensor], shards: Sequence[Shard | None]) -> Tensor:
    """The least score inside the masks, over all layers and processes; infinite where there is none. 0-dim."""
    kept = torch.cat([score.masked_fill(~mask, torch.inf).flatten() for score, mask in zip(scores, masks, strict=True)])
    least = kept.amin() if kept.numel() else kept.new_full((), torch.inf)
    group = shared_group(shards)
    if group is not None:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
    return least


def write_sparse(weight: Tensor, values: Tensor, mask: Tensor) -> None:
    """Put ``values`` where ``mask`` is and exact zeros elsewhere; a live value that is 0 is made the least nonzero."""
    tiny = torch.finfo(weight.dtype).tiny
    weight.copy_(torch.where(mask, torch.where(values == 0.0, tiny, values), 0.0))


def separate(magnitude: Tensor, threshold: Tensor, mask: Tensor, shard: Shard | None = None) -> Tensor:
    """The nearest threshold, row by row, that has the magnitudes in ``mask`` above it and the others below.

    ``threshold`` has one number a row, (out, 1, ..., 1), or one for the whole layer, (1, ..., 1); ``shard`` is given
    for one that the parts of a layer share.
    """
    rows = [dim for dim in range(magnitude.dim()) if threshold.shape[dim] == 1]
    kept, dropped = magnitude.masked_fill(~mask, torch.inf), magnitude.masked_fill(mask, 0.0)
    if magnitude.numel():
        least_kept, most_dropped = kept.amin(rows, keepdim=True), dropped.amax(rows, keepdim=True)
    else:
        least_kept, most_dropped = torch.full_like(threshold, torch.inf), torch.zeros_like(threshold)
    if shard is not None:
        torch.distributed.all_reduce(least_kept, torch.distributed.ReduceOp.MIN, group=shard.group)
        torch.distributed.all_reduce(most_dropped, torch.distributed.ReduceOp.MAX, group=shard.group)
    between = torch.where(least_kept.isinf(), most_dropped * 1.001, (least_kept + most_dropped) / 2)
    return torch.where((threshold < most_dropped) | (threshold >= least_kept), between, threshold)


def drop_and_grow(
    magnitude: Tensor, mask: Tensor, growth: Tensor, fraction: float, block: Block = (1, 1), shard: Shard | None = None
) -> Tensor:
    """The mask after dropping this share of the live and growing as many of what is not live then.

    Args:
        magnitude: what to keep most, (out, in, ...); -1 where the mask is not.
        mask: boolean, of the same shape.
        growth: what to grow most.
        fraction: of the live weights, rounded down, and at most as many as are not live.
        block: of how many consecutive outputs and inputs the weights are dropped and grown together.
        shard: the part of the layer that this is.
    """
    live = block_sum(mask, block) > 0
    keep_score = block_sum(magnitude, block)
    numbers = torch.stack([live.sum(), torch.tensor(live.numel(), device=live.device)])
    alive, size = (int(n) for n in total(numbers, [shard, shard]).tolist())
    moved = min(int(fraction * alive), size - alive)
    kept = top_k(keep_score, alive - moved, shard)
    grow_score = block_sum(growth, block).double().masked_fill(kept, -torch.inf)
    return block_expand(kept | top_k(grow_score, moved, shard), block)


def block_sum(scores: Tensor, block: Block) -> Tensor:
    """(out, in, ...) -> (out / rows, in / columns, ...): the sum over each block of so many (rows, columns)."""
    if block == (1, 1):
        return scores
    (rows, columns), (outputs, inputs, *kernel) = block, scores.shape
    return scores.reshape(outputs // rows, rows, inputs // columns, columns, *kernel).sum((1, 3))


def block_expand(blocks: Tensor, block: Block) -> Tensor:
    """(out / rows, in / columns, ...) -> (out, in, ...): what holds for a block, for each of its weights."""
    for dim, width in enumerate(block):
        blocks = blocks if width == 1 else blocks.repeat_interleave(width, dim)
    return blocks


def check_divisible(layers: Sequence[Layer], block: Block, what: str) -> None:
    """Raise ValueError for layers whose weights, or parts of them, ``what`` of this size cannot be laid over."""
    if block == (1, 1):
        return
    turned = [layer.name for layer in layers if layer.inputs_first]
    if turned:
        raise ValueError(
            f"{what} are of consecutive inputs, and in layer {turned[0]!r} (a transposed convolution, or the Conv1D of "
            f"transformers) the weight has its inputs first and outputs second; pass exclude={turned}"
        )
    odd = [layer for layer in layers if any(size % width for size, width in zip(layer.shape, block, strict=False))]
    if odd:
        outputs, inputs = odd[0].shape[:2]
        has = f"{inputs} inputs to an output" if inputs % block[1] else f"{outputs} outputs"
        raise ValueError(
            f"layer {odd[0].name!r} has {has}, which {what} do not divide; pass exclude={[each.name for each in odd]}"
        )
    cut = {layer.name: layer.shard.rows for layer in layers if layer.shard and layer.shard.rows % block[0]}
    if cut:
        name, rows = next(iter(cut.items()))
        raise ValueError(
            f"layer {name!r} is split over the processes into parts of {rows} outputs, and {what} would lie in two of "
            f"them; shard over fewer processes, so that {block[0]} divides the parts, or pass exclude={list(cut)}"
        )


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
