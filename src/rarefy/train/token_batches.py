"""Sentences cut into batches by pure functions of the seed, the epoch and the step: resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rarefy.data.translation import Batch, Encoded
from rarefy.train.batches import mixed_seed


class TokenBatches:
    """Micro-batches of one process: sentences of about one length together, as many as a number of tokens allows.

    Every epoch mixes the sentences of one length, and the batches, anew. A pair longer than ``longest`` is left out.

    Args:
        data: what to cut.
        batch_tokens: tokens of a micro-batch at most, padding among them, of the longer side.
        longest: tokens of a sentence at most, on either side, with the end.
        accumulate: micro-batches an optimizer step.
        seed: of the order.
        rank, world: this process among how many.

    Raises:
        ValueError: nothing is left, or a longest sentence does not fit into a batch.

    """

    def __init__(
        self,
        data: Encoded,
        *,
        batch_tokens: int,
        longest: int = 60,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 2 <= longest <= batch_tokens:
            raise ValueError(f"longest must be in [2, batch_tokens], so that it fits; got {longest} and {batch_tokens}")
        self.data, self.seed, self.rank = data, seed, rank
        sizes = np.maximum(*data.lengths) + 1
        self.kept = np.flatnonzero(sizes <= longest)
        if not len(self.kept):
            raise ValueError(f"no pair has at most {longest} tokens a side: raise longest")
        self._sizes = sizes[self.kept]
        # By length alone, so every epoch has as many batches.
        ordered = np.sort(self._sizes)
        self._cuts, begin = [0], 0
        for place, size in enumerate(ordered):
            if (place - begin + 1) * size > batch_tokens:
                self._cuts.append(place)
                begin = place
        self._cuts.append(len(ordered))
        self.accumulate, self.world = accumulate, world
        if not len(self):
            raise ValueError(
                f"{len(self._cuts) - 1} batches of {batch_tokens} tokens are fewer than {accumulate} micro-batches for "
                f"{world} processes: lower batch_tokens"
            )

    def __len__(self) -> int:
        """Optimizer steps an epoch."""
        return (len(self._cuts) - 1) // (self.accumulate * self.world)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[list[Batch], int]]:
        """Give, for each optimizer step from step ``first`` of an epoch on, this process's micro-batches.

        Beside them stands how many target tokens, with the ends, the step has over all processes and micro-batches.
        """
        order = np.random.default_rng(mixed_seed(self.seed, epoch))
        shuffled = order.permutation(len(self.kept))
        ordered = shuffled[np.argsort(self._sizes[shuffled], kind="stable")]
        batches = order.permutation(len(self._cuts) - 1)
        step = self.accumulate * self.world
        for index in range(first, len(self)):
            groups = [
                self.kept[ordered[self._cuts[b] : self._cuts[b + 1]]]
                for b in batches[index * step : (index + 1) * step]
            ]
            words = sum(int(self.data.lengths[1][group].sum()) + len(group) for group in groups)
            yield [self.data.batch(group.tolist()) for group in groups[self.rank :: self.world]], words
