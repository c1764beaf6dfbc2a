"""Search for the best translation: greedy, and beams with the length and coverage penalties of GNMT (section 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.models.best import best
from rarefy.models.gnmt import LayerState, Memory, check_sentences


class Network(Protocol):
    """What a search needs of a network, as :class:`rarefy.models.GNMT` has it."""

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """Read sentences (B, S) of lengths (B,)."""

    def decode(
        self, target: Tensor, memory: Memory, state: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState], Tensor]:
        """Go on with tokens (B, 1): logits (B, 1, vocab_size), the new state, and the attention (B, 1, S)."""


@dataclass(frozen=True)
class Translation:
    """One translation.

    Attributes:
        tokens: without the begin and the end; cut at the longest length where no end came.
        score: log P / lp + cp, equation 14 of arXiv 1609.08144, natural logarithm.

    """

    tokens: list[int]
    score: float


class NotANumberError(ValueError):
    """The network's numbers for a sentence are NaN, so there is nothing to search for.

    Attributes:
        sentence: its index.

    """

    def __init__(self, sentence: int, name: str | None = None) -> None:
        name = name or f"the sentence at index {sentence}"
        super().__init__(f"{name} has no translation: the network's logits for it are NaN")
        self.sentence = sentence


def length_penalty(length: int, alpha: float) -> float:
    """Return lp = ((5 + length) / 6)^alpha; ``length`` counts the end."""
    return float(((5.0 + length) / 6.0) ** alpha)


def coverage_penalty(seen: Tensor, padding: Tensor, beta: float) -> Tensor:
    """Return cp = beta * sum over source tokens of log(min(attention that each got, 1)).

    ``seen`` is that sum of attention, (..., S), and ``padding`` bool (..., S); gives (...).
    """
    share = seen.clamp(min=torch.finfo(seen.dtype).tiny, max=1.0).log()
    return beta * share.masked_fill(padding, 0.0).sum(-1)


@torch.no_grad()
def translate(
    model: Network,
    source: Tensor,
    lengths: Tensor,
    *,
    begin: int,
    end: int,
    beam: int = 1,
    longest: int | Tensor | None = None,
    alpha: float = 0.6,
    beta: float = 0.1,
) -> list[Translation]:
    """Translate a batch, all sentences at once; with a beam of 1 greedily.

    Partial translations of one length compete by their log-probability, with those that end there, which leave the
    beam; finished ones compete by equation 14. The search is over when nothing that is left could become better.

    Args:
        model: a GNMT in evaluation mode, on the device of the sentences; or, on the CPU, a
            :class:`rarefy.models.compiled.CompiledGNMT`.
        source: tokens (B, S), padded at the end.
        lengths: how many tokens each sentence has, (B,), at least 1.
        begin: the token that begins a translation.
        end: the token that ends it.
        beam: how many partial translations go on a step.
        longest: tokens of a translation at most, the end among them; for all, or (B,). None is 10 + 1.5 S.
        alpha: strength of the length penalty; 0 compares log-probabilities.
        beta: strength of the coverage penalty.

    Raises:
        TypeError: sentences or lengths that are no tensors.
        ValueError: a beam, a length or a shape that cannot be; as :class:`NotANumberError` logits that are NaN.

    """
    check_sentences(source, lengths)
    beam = _checks.whole("beam", beam)
    if source.shape[0] == 0:
        return []
    if longest is None:
        longest = (10 + 1.5 * lengths.float()).long()
    limits = torch.as_tensor(longest, device=source.device)
    if limits.is_floating_point() or limits.shape not in ((), lengths.shape):
        raise ValueError(f"longest must be a whole number, or (B,) of them, got {longest!r:.80}")
    if int(limits.min()) < 1:
        raise ValueError(f"longest must be at least 1, got {int(limits.min())}")
    limits = limits.expand(len(source))
    return _Search(model, source, lengths, limits, begin, end, beam, alpha, beta).run()


class _Search:
    """B sentences with K partial translations each, as B * K rows.

    Sentences whose search is over leave when they are half of the rows, so that a long one is soon by itself.
    """

    def __init__(
        self,
        model: Network,
        source: Tensor,
        lengths: Tensor,
        limits: Tensor,
        begin: int,
        end: int,
        beam: int,
        alpha: float,
        beta: float,
    ) -> None:
        self.model, self.end, self.beam, self.alpha, self.beta = model, end, beam, alpha, beta
        self.limits: list[int] = limits.tolist()
        memory = model.encode(source, lengths)
        self.memory = Memory(*(part.repeat_interleave(beam, 0) for part in memory))
        sentences, device = len(source), source.device
        self.first = torch.arange(sentences, device=device).unsqueeze(1) * beam  # row of each sentence's first
        self.token = torch.full((sentences * beam, 1), begin, device=device)
        # at first all K are the same one: one counts
        self.total = torch.full((sentences, beam), -math.inf, device=device)
        self.total[:, 0] = 0.0
        self.seen = torch.zeros(sentences * beam, source.shape[1], device=device)
        self.said = torch.zeros(sentences * beam, 0, dtype=torch.long, device=device)
        self.state: list[LayerState] = []
        self.best: dict[int, Translation] = {}
        self.numbers = list(range(sentences))  # of those that are searched for still

    def run(self) -> list[Translation]:
        sentences = len(self.numbers)
        for length in range(1, max(self.limits) + 1):
            self._step(length)
            open_ = self._open()
            if not open_:
                break
            if 2 * len(open_) <= len(self.numbers):
                self._keep(open_)
        return [self.best[number] for number in range(sentences)]

    def _open(self) -> list[int]:
        """Return the places of those of which something partial can still win.

        log P only falls, and the penalty that divides it is largest at the end.
        """
        found = []
        for place, total in enumerate(self.total.amax(1).tolist()):
            number = self.numbers[place]
            if math.isnan(total):
                raise NotANumberError(number)
            before, hope = self.best.get(number), total / length_penalty(self.limits[place], self.alpha)
            if before is None or before.score < hope:
                found.append(place)
        return found

    def _keep(self, places: list[int]) -> None:
        """Go on with the sentences at these places alone."""
        chosen = torch.tensor(places, device=self.total.device)
        rows = (self.first[chosen] + torch.arange(self.beam, device=chosen.device)).flatten()
        self.memory = Memory(*(part[rows] for part in self.memory))
        self.token, self.seen, self.said = self.token[rows], self.seen[rows], self.said[rows]
        self.state = [(h[:, rows], c[:, rows]) for h, c in self.state]
        self.total, self.first = self.total[chosen], self.first[: len(places)]
        self.limits, self.numbers = ([each[place] for place in places] for each in (self.limits, self.numbers))

    def _step(self, length: int) -> None:
        logits, state, weights = self.model.decode(self.token, self.memory, self.state or None)
        sentences, beam = self.total.shape
        # what is among the best of a sentence is among the best of its row
        logp, words = best(logits[:, 0], min(beam, logits.shape[2]))
        score = logp.view(sentences, beam, -1) + self.total.unsqueeze(2)
        self.total, place = score.flatten(1).topk(beam, 1)
        self.token = words.view(sentences, -1).gather(1, place).view(-1, 1)
        seen = self.seen + weights[:, 0].float()
        if beam > 1:
            rows = (self.first + place // logp.shape[1]).flatten()
            state = [(h.index_select(1, rows), c.index_select(1, rows)) for h, c in state]
            seen, self.said = seen.index_select(0, rows), self.said.index_select(0, rows)
        self.state, self.seen = state, seen
        self.said = torch.cat([self.said, self.token], 1)

        ended = (self.token == self.end).view_as(self.total)
        over = ended | torch.tensor([length == limit for limit in self.limits], device=ended.device).unsqueeze(1)
        if not over.any():
            return
        coverage = coverage_penalty(self.seen, self.memory.padding, self.beta).view_as(self.total)
        final = self.total / length_penalty(length, self.alpha) + coverage
        value, which = final.masked_fill(~over, -math.inf).max(1)
        for index, (number, row) in enumerate(zip(value.tolist(), which.tolist(), strict=True)):
            sentence = self.numbers[index]
            if math.isnan(number):
                raise NotANumberError(sentence)
            before = self.best.get(sentence)
            if number > (-math.inf if before is None else before.score):
                tokens = self.said[index * beam + row].tolist()
                self.best[sentence] = Translation(tokens[:-1] if tokens[-1] == self.end else tokens, number)
        self.total[over] = -math.inf
