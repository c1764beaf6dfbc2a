"""GNMT: Wu et al., Google's Neural Machine Translation System (arXiv 1609.08144), in the form that MLPerf made common.

That form has the attention of Bahdanau et al. (arXiv 1409.0473), normalised (Luong et al.'s TensorFlow tutorial), from
the first decoder layer to all of them, and residuals from the third layer of the encoder and of the decoder on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rarefy import _checks

#: (h, c) of one layer, each (1, batch, hidden_size).
LayerState = tuple[Tensor, Tensor]


class Memory(NamedTuple):
    """A source sentence as the decoder sees it, for a batch of B and at most S tokens.

    Attributes:
        values: what the encoder gives, (B, S, hidden_size).
        keys: the values as the attention compares them, (B, S, hidden_size).
        padding: which tokens are none, bool (B, S).

    """

    values: Tensor
    keys: Tensor
    padding: Tensor


def _lstm(input_size: int, hidden_size: int, mode: str) -> nn.LSTM:
    if mode == "torch":
        return nn.LSTM(input_size, hidden_size, batch_first=True)
    from rarefy import act  # late, since it takes a second to import

    return act.LSTM(input_size, hidden_size, batch_first=True, mode=mode)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by 16 random bits a number on a CPU, where PyTorch draws them one by one."""

    def forward(self, x: Tensor) -> Tensor:
        """Leave out round(65536 p) / 65536 of the numbers in training; x of any shape."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        count = x.numel()
        drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = drawn[:count].view(x.shape) >= round(65536 * self.p) - 32768
        return x * (kept.to(x.dtype) * (1 / (1 - self.p)))


def reversed_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn the first ``lengths[b]`` of the steps of each sentence around; x (B, S, C), the padding stays last."""
    steps = torch.arange(x.shape[1], device=x.device)
    last = lengths.to(x.device).unsqueeze(1) - 1
    order = torch.where(steps <= last, last - steps, steps)
    return x.gather(1, order.unsqueeze(2).expand_as(x))


def check_sentences(source: Tensor, lengths: Tensor) -> None:
    """Raise TypeError or ValueError unless these are tokens (B, S) and how many each sentence has, (B,), 1 to S."""
    for name, given in (("source", source), ("lengths", lengths)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if source.ndim != 2 or lengths.shape != source.shape[:1]:
        shapes = f"{tuple(source.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"source must be (B, S) and lengths (B,), got {shapes}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be whole numbers, got {lengths.dtype}")
    least, most = (int(each) for each in lengths.aminmax()) if len(lengths) else (1, 1)
    if least < 1:
        raise ValueError(f"every sentence needs a token at least: leave the empty ones out; got a length of {least}")
    if most > source.shape[1]:
        raise ValueError(f"source has {source.shape[1]} tokens a sentence, got a length of {most}")


def _is_recorded(lengths: Tensor) -> bool:
    """Whether lengths have no numbers to look at, or on a GPU only such as must be waited for."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    wrapped = type(lengths) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(lengths)
    return wrapped or not lengths.is_cpu


class Encoder(nn.Module):
    """Source tokens to one vector each: a bidirectional layer, then layers with residuals from the third on."""

    def __init__(self, hidden_size: int, num_layers: int, dropout: float, mode: str) -> None:
        super().__init__()
        self.forwards = _lstm(hidden_size, hidden_size, mode)
        self.backwards = _lstm(hidden_size, hidden_size, mode)
        sizes = [2 * hidden_size] + [hidden_size] * (num_layers - 2)
        self.layers = nn.ModuleList(_lstm(size, hidden_size, mode) for size in sizes[: num_layers - 1])
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Take embeddings (B, S, hidden_size) of sentences of these lengths, padded at the end; return the same shape.

        What stands at the padding is of no use.
        """
        x = self.dropout(x)
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(reversed_steps(x, lengths))
        x = torch.cat([ahead, reversed_steps(back, lengths)], 2)
        for index, layer in enumerate(self.layers):
            y, _ = layer(self.dropout(x))
            x = y if index == 0 else x + y
        return x


#: Numbers (B, T, S, H) of the additive attention that are there at once where no gradient is wanted.
_MIXED = 1 << 24


class Attention(nn.Module):
    """Additive attention, normalised: score = g v/|v| . tanh(W q + U k + b), weights = softmax of the scores."""

    def __init__(self, hidden_size: int, mode: str) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.vector = nn.Parameter(torch.empty(hidden_size))
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.tanh: nn.Module = nn.Tanh()
        if mode != "torch":
            from rarefy import act

            self.tanh = act.Tanh(mode)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Take queries (B, T, hidden_size); return the contexts, of that shape, and the weights (B, T, S)."""
        # (B, T, 1, H) + (B, 1, S, H)
        keys = memory.keys + self.bias.to(memory.keys.dtype)  # under autocast the parameter is the wider
        queries, direction = self.query(x), self.scale * self.vector / self.vector.norm()
        # What has no gradient to come back for needs never be there whole: one long sentence would fill the memory.
        steps = queries.shape[1] if torch.is_grad_enabled() else _MIXED // max(keys.numel(), 1)
        mixed = (part.unsqueeze(2) + keys.unsqueeze(1) for part in queries.split(max(steps, 1), 1))
        scores = torch.cat([self.tanh(part) @ direction.to(part.dtype) for part in mixed], 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = scores.masked_fill(memory.padding.unsqueeze(1), -math.inf).softmax(2, dtype=wide).to(x.dtype)
        return weights @ memory.values, weights


class Decoder(nn.Module):
    """Target tokens to the next ones: every layer sees the context of the first; residuals from the third on."""

    def __init__(self, hidden_size: int, num_layers: int, dropout: float, mode: str) -> None:
        super().__init__()
        self.first = _lstm(hidden_size, hidden_size, mode)
        self.attention = Attention(hidden_size, mode)
        self.layers = nn.ModuleList(_lstm(2 * hidden_size, hidden_size, mode) for _ in range(num_layers - 1))
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Memory, state: list[LayerState] | None
    ) -> tuple[Tensor, list[LayerState], Tensor]:
        """Take embeddings (B, T, hidden_size); return the same shape, the new states, and the weights (B, T, S)."""
        begin: list[LayerState | None] = [None] * (1 + len(self.layers)) if state is None else list(state)
        states: list[LayerState] = []
        x, after = self.first(self.dropout(x), begin[0])
        states.append(after)
        context, weights = self.attention(x, memory)
        for index, layer in enumerate(self.layers):
            y, after = layer(self.dropout(torch.cat([x, context], 2)), begin[index + 1])
            states.append(after)
            x = y if index == 0 else x + y
        return x, states, weights


class GNMT(nn.Module):
    """Translate tokens to tokens; see the module's docstring for which GNMT it is.

    With 4 layers of 1,024, a vocabulary of 32,320 and one embedding for both languages it has 160,671,297 parameters.

    Args:
        vocab_size: tokens of each language.
        hidden_size: width of the embeddings, of every LSTM and of the attention.
        num_layers: LSTM layers of the encoder, and of the decoder; the encoder's first counts once. At least 2.
        dropout: share of an LSTM's inputs that training leaves out, in [0, 1).
        shared_embedding: whether both languages have one table of embeddings.
        mode: "torch", or a mode of :mod:`rarefy.act` for tanh and sigmoid in every LSTM and in the attention.
        padding: the token that is none.

    Raises:
        ValueError: an option out of its range.

    """

    def __init__(
        self,
        vocab_size: int = 32320,
        *,
        hidden_size: int = 1024,
        num_layers: int = 4,
        dropout: float = 0.2,
        shared_embedding: bool = True,
        mode: str = "torch",
        padding: int = 0,
    ) -> None:
        for name, value, least in (
            ("vocab_size", vocab_size, 2),
            ("hidden_size", hidden_size, 1),
            ("num_layers", num_layers, 2),
        ):
            _checks.whole(name, value, least)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        if mode != "torch":
            from rarefy.act.spec.reference import MODES

            if mode not in MODES:
                raise ValueError(f"mode must be one of torch, {', '.join(MODES)}, got {mode!r}")
        if not 0 <= padding < vocab_size:
            raise ValueError(f"padding must be a token, 0 to {vocab_size - 1}, got {padding!r}")
        super().__init__()
        self.padding = padding
        self.source_embedding = nn.Embedding(vocab_size, hidden_size, padding_idx=padding)
        self.target_embedding: nn.Embedding | None = None  # None is the source's
        if not shared_embedding:
            self.target_embedding = nn.Embedding(vocab_size, hidden_size, padding_idx=padding)
        self.encoder = Encoder(hidden_size, num_layers, dropout, mode)
        self.decoder = Decoder(hidden_size, num_layers, dropout, mode)
        self.output = nn.Linear(hidden_size, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the reference does: evenly from (-0.1, 0.1) at 1,024.

        A narrower network draws from a wider range, so that sums of products keep their size. An LSTM needs one bias:
        its second begins at 0.
        """
        bound = 0.1 * (1024 / self.output.in_features) ** 0.5
        for name, parameter in self.named_parameters():
            if "bias_hh" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)
        attention = self.decoder.attention
        nn.init.constant_(attention.scale, attention.vector.numel() ** -0.5)
        nn.init.zeros_(attention.bias)
        with torch.no_grad():
            for embedding in (self.source_embedding, self.target_embedding):
                if embedding is not None:
                    embedding.weight[self.padding] = 0

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """Read sentences: tokens (B, S), padded at the end, and how many each has, (B,), at least 1.

        Raises TypeError and ValueError for what they cannot be; lengths on a GPU are not looked at.
        """
        if not isinstance(lengths, Tensor) or not _is_recorded(lengths):
            check_sentences(source, lengths)
        values = self.encoder(self.source_embedding(source), lengths)
        steps = torch.arange(source.shape[1], device=source.device)
        padding = steps >= lengths.to(source.device).unsqueeze(1)
        return Memory(values, self.decoder.attention.key(values), padding)

    def decode(
        self, target: Tensor, memory: Memory, state: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState], Tensor]:
        """Go on with tokens (B, T) from a state, None at the beginning.

        Returns the logits of what follows each, (B, T, vocab_size), the new state, and what the attention looked at,
        (B, T, S).
        """
        embedding = self.source_embedding if self.target_embedding is None else self.target_embedding
        x, states, weights = self.decoder(embedding(target), memory, state)
        return self.output(x.contiguous()), states, weights  # or the bias is added by itself

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return the logits (B, T, vocab_size) of what follows each token of ``target`` (B, T).

        ``source`` (B, S) and ``lengths`` (B,) are as :meth:`encode` takes them.
        """
        logits, _, _ = self.decode(target, self.encode(source, lengths))
        return logits
