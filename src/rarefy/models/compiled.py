"""GNMT as engines: what :func:`rarefy.models.search.translate` needs of it, at the speed of its zeros."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import act, engine
from rarefy.act.kernels import aten
from rarefy.engine import Engine
from rarefy.engine.attention import additive_scores
from rarefy.engine.functions import whole_table
from rarefy.models.gnmt import GNMT, Attention, Decoder, LayerState, Memory, check_sentences, reversed_steps

#: Rows that a part is made for: a batch is padded to the first that is not smaller, or to some times the last. They are
#: the numbers of samples that native programs take together.
_ROWS = (1, 4, 16, 32, 64)
#: An encoder's layer takes so many tokens at once, and the next ones from the state after them: so one is enough for
#: sentences of any length. Not measured apart.
_TOKENS = 8


class CompiledGNMT:
    """A :class:`GNMT` to translate with on the CPU; it holds the network, which may not change any more.

    It encodes and decodes as the network does, without gradient, to float rounding. The parts, the layers of the
    encoder and what is before and behind the attention of the decoder, are compiled when they are first needed, in a
    second or two each, for some numbers of sentences; a batch between them is padded.

    Args:
        model: in evaluation mode, on the CPU, in float32.
        threads: how many threads the native kernels use; None takes ``torch.get_num_threads()`` at each call.
        tune_seconds: at most about so much time to measure the kernels of a part for; 0 chooses them by rule.

    Raises:
        TypeError: ``model`` is no GNMT.
        ValueError: it is not in evaluation mode, on the CPU and in float32.

    """

    def __init__(self, model: GNMT, *, threads: int | None = None, tune_seconds: float = 1.0) -> None:
        if not isinstance(model, GNMT):
            raise TypeError(f"model must be a rarefy.models.GNMT, got {type(model).__name__}")
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        for name, weight in model.named_parameters():
            if weight.dtype is not torch.float32 or weight.device.type != "cpu":
                raise ValueError(
                    f"the model must be on the CPU in float32, {name!r} is {weight.dtype} on {weight.device}: call "
                    "model.cpu().float() first"
                )
        self._threads, self._tune_seconds = threads, tune_seconds
        self._model = model
        self._hidden, self._layers = model.output.in_features, 1 + len(model.decoder.layers)
        attention = model.decoder.attention
        with torch.no_grad():
            self._direction = attention.scale * attention.vector / attention.vector.norm()
        tanh = attention.tanh
        self._mode = (tanh.mode, whole_table(aten.text_of(tanh.table))) if isinstance(tanh, act.Tanh) else ("exact", "")
        encoder, decoder = model.encoder, model.decoder
        self._parts: dict[str, nn.Module] = {
            "ahead": _Layer(encoder.forwards),
            "back": _Layer(encoder.backwards),
            **{f"layer {index}": _Layer(layer) for index, layer in enumerate(encoder.layers)},
            "key": _Key(decoder.attention),
            "begin": _Begin(decoder),
            "finish": _Finish(model),
        }
        self._engines: dict[tuple[str, int], Engine] = {}

    @torch.no_grad()
    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """Read sentences: tokens (B, S), padded at the end, and how many each has, (B,), at least 1.

        The keys of what comes back have the attention's bias in them. Raises TypeError and ValueError for sentences
        and lengths that cannot be.
        """
        check_sentences(source, lengths)
        (batch, tokens), model = source.shape, self._model
        rows = _rows(batch)
        source = F.pad(source, (0, -tokens % _TOKENS, 0, rows - batch), value=model.padding)
        lengths = F.pad(lengths, (0, rows - batch), value=1)
        x = model.source_embedding(source)
        # as Encoder.forward
        back = reversed_steps(self._sequence("back", reversed_steps(x, lengths)), lengths)
        x = torch.cat([self._sequence("ahead", x), back], 2)
        for index in range(len(model.encoder.layers)):
            y = self._sequence(f"layer {index}", x)
            x = y if index == 0 else x + y
        values = x[:batch, :tokens].contiguous()
        keys = values.view(-1, self._hidden)
        keys = self._run("key", _rows(len(keys)), keys)[0][: len(keys)].view_as(values)
        lengths = lengths[:batch]
        padding = torch.arange(tokens) >= lengths.unsqueeze(1)
        return Memory(values, keys, padding)

    @torch.no_grad()
    def decode(
        self, target: Tensor, memory: Memory, state: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState], Tensor]:
        """Go on with one token of each sentence, (B, 1), from a state, None at the beginning.

        Returns the logits of what follows, (B, 1, vocab_size), the new state, and what the attention looked at,
        (B, 1, S).
        """
        if target.dim() != 2 or target.shape[1] != 1:
            raise ValueError(f"target must be one token of each sentence, (B, 1), got {tuple(target.shape)}")
        model = self._model
        embedding = model.source_embedding if model.target_embedding is None else model.target_embedding
        batch = len(target)
        rows = _rows(batch)
        if state is None:
            zeros = torch.zeros(1, batch, self._hidden)
            state = [(zeros, zeros)] * self._layers
        before = [part[0] for layer in state for part in layer]
        x, query, *first = self._run("begin", rows, embedding(target.squeeze(1)), *before[:2])
        # Decoder.forward and Attention.forward have the formulas
        scores = additive_scores(memory.keys, query[:batch], self._direction, *self._mode)
        weights = scores.masked_fill_(memory.padding, -math.inf).softmax(1).unsqueeze(1)
        logits, *others = self._run("finish", rows, x, (weights @ memory.values).squeeze(1), *before[2:])
        after = [part[:batch].unsqueeze(0) for part in (*first, *others)]
        return logits[:batch].unsqueeze(1), list(zip(after[::2], after[1::2], strict=True)), weights

    def _sequence(self, part: str, x: Tensor) -> Tensor:
        """What a layer of the encoder makes of (rows, steps, size)."""
        h = c = torch.zeros(len(x), self._hidden)
        made: list[Tensor] = []
        for first in range(0, x.shape[1], _TOKENS):
            y, h, c = self._run(part, len(x), x[:, first : first + _TOKENS], h, c)
            made.append(y)
        return torch.cat(made, 1)

    def _run(self, part: str, rows: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What a part makes of inputs that are padded to so many rows."""
        size = min(rows, _ROWS[-1])
        given = [x if len(x) == rows else F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))) for x in inputs]
        if (part, size) not in self._engines:
            chance = torch.Generator().manual_seed(0)  # the caller's random numbers are none of its business
            example = [torch.randn(size, *x.shape[1:], generator=chance, dtype=torch.float32) for x in inputs]
            self._engines[part, size] = engine.compile(
                self._parts[part].eval(), example, self._threads, tune_seconds=self._tune_seconds
            )
        outputs: tuple[Tensor, ...] = self._engines[part, size](*given)
        return outputs


def _rows(batch: int) -> int:
    """How many rows a batch is padded to."""
    return next((each for each in _ROWS if each >= batch), -(-batch // _ROWS[-1]) * _ROWS[-1])


def _one(layer: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer for one step: y, h and c, each (B, hidden_size)."""
    y, (h, c) = layer(x.unsqueeze(1), (h.unsqueeze(0), c.unsqueeze(0)))
    return y.squeeze(1), h.squeeze(0), c.squeeze(0)


class _Layer(nn.Module):
    """A layer for some steps, from a state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
        return y, h.squeeze(0), c.squeeze(0)


class _Key(nn.Module):
    """The attention's keys, with its bias."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.key, self.bias = attention.key, attention.bias

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (F.linear(x, self.key.weight, self.bias),)


class _Begin(nn.Module):
    """A decoder's first layer, and what the attention asks for."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.first, self.query = decoder.first, decoder.attention.query

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h, c = _one(self.first, x, h, c)
        return y, self.query(y), h, c


class _Finish(nn.Module):
    """A decoder's other layers, and the logits."""

    def __init__(self, model: GNMT) -> None:
        super().__init__()
        self.layers, self.output = model.decoder.layers, model.output

    def forward(self, x: Tensor, context: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        after: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            y, *state = _one(layer, torch.cat([x, context], 1), *before[2 * index : 2 * index + 2])
            after += state
            x = y if index == 0 else x + y
        return self.output(x), *after
