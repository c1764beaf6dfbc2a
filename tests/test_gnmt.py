"""GNMT: its size, its arithmetic against a plain composition, and its search against trying everything."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rarefy import cost
from rarefy.models import GNMT, gnmt
from rarefy.models.compiled import CompiledGNMT
from rarefy.models.search import NotANumberError, length_penalty, translate

LENGTHS = torch.tensor([5, 1, 3])


def small(**options):
    torch.manual_seed(3)
    options = {"hidden_size": 8, "num_layers": 4, "dropout": 0.0, **options}
    return GNMT(11, **options).double().eval()


def sentences(vocab=11):
    source = torch.randint(1, vocab, (3, 5), generator=torch.Generator().manual_seed(1))
    return source.where(torch.arange(5) < LENGTHS.unsqueeze(1), 0)


def test_every_mode_costs_the_same():
    counted = [
        cost.count(GNMT(60, hidden_size=16, mode=mode), (sentences(), LENGTHS, sentences()), "rigl")
        for mode in ("torch", "exact", "ktanh")
    ]
    assert counted[0].dense > 0
    assert counted[0] == counted[1] == counted[2]


@torch.no_grad()
def test_the_published_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in GNMT().parameters())
        apart = sum(p.numel() for p in GNMT(shared_embedding=False).parameters())
    assert count == 160_671_297
    assert apart - count == 32320 * 1024


@pytest.mark.parametrize("layers", [2, 4])
def test_it_is_the_published_network(layers):
    """Held against nn.LSTM over packed sentences, and attention in a loop over every query and key."""
    model = small(num_layers=layers)
    source, target = sentences(), torch.randint(1, 11, (3, 4))
    x = model.source_embedding(source)
    both = nn.LSTM(8, 8, bidirectional=True, batch_first=True).double()
    for name, own in both.named_parameters():
        layer = model.encoder.backwards if name.endswith("_reverse") else model.encoder.forwards
        own.data = layer.get_parameter(name.removesuffix("_reverse"))
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    x, _ = pad_packed_sequence(both(packed)[0], batch_first=True)
    for index, layer in enumerate(model.encoder.layers):
        x = layer(x)[0] + (x if index else 0)
    values = x

    y, _ = model.decoder.first(model.source_embedding(target))
    a, context = model.decoder.attention, torch.zeros(3, 4, 8, dtype=torch.float64)
    for b, t in itertools.product(range(3), range(4)):
        scores = [
            a.scale * (a.vector / a.vector.norm()) @ torch.tanh(a.query(y[b, t]) + a.key(values[b, s]) + a.bias)
            for s in range(LENGTHS[b])
        ]
        context[b, t] = torch.stack(scores).softmax(0) @ values[b, : LENGTHS[b]]
    for index, layer in enumerate(model.decoder.layers):
        y = layer(torch.cat([y, context], 2))[0] + (y if index else 0)
    torch.testing.assert_close(model(source, LENGTHS, target), model.output(y), rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing():
    model, source, target = small(), sentences(), torch.randint(1, 11, (3, 4))
    wide = torch.cat([source, source.new_zeros(3, 2)], 1)
    alone = torch.cat(
        [model(source[b : b + 1, :n], LENGTHS[b : b + 1], target[b : b + 1]) for b, n in enumerate(LENGTHS)]
    )
    torch.testing.assert_close(model(wide, LENGTHS, target), alone, rtol=1e-12, atol=1e-12)


def test_decoding_goes_on_from_its_state():
    model, target = small(), torch.randint(1, 11, (3, 4))
    memory = model.encode(sentences(), LENGTHS)
    whole, _, _ = model.decode(target, memory)
    state, parts = None, []
    for step in range(4):
        logits, state, _ = model.decode(target[:, step : step + 1], memory, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def everything(model, source, lengths, longest, alpha, beta):
    """Equation 14 for every translation of at most ``longest`` tokens, by teacher forcing: the best one."""
    memory, best = model.encode(source, lengths), (-math.inf, [])
    words = [token for token in range(4) if token != 2]
    for length in range(1, longest + 1):
        for body in itertools.product(words, repeat=length - 1):
            for last in [2, *words] if length == longest else [2]:
                said = [*body, last]
                logits, _, weights = model.decode(torch.tensor([[1, *said[:-1]]]), memory)
                logp = logits[0].log_softmax(1)[torch.arange(length), said].sum().item()
                seen = weights[0].sum(0).clamp(max=1)
                score = logp / ((5 + length) / 6) ** alpha + beta * seen.log().sum().item()
                best = max(best, (score, said[:-1] if last == 2 else said))
    return best


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (1.0, 0.0), (0.6, 0.5)])
def test_a_wide_beam_finds_the_best_of_all(alpha, beta):
    torch.manual_seed(5)
    model = GNMT(4, hidden_size=6, num_layers=2, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12)
    source, lengths = torch.tensor([[1, 3, 2], [3, 1, 1]]), torch.tensor([3, 1])
    found = translate(model, source, lengths, begin=1, end=2, beam=81, longest=4, alpha=alpha, beta=beta)
    for b, translation in enumerate(found):
        n = int(lengths[b])
        score, tokens = everything(model, source[b : b + 1, :n], lengths[b : b + 1], 4, alpha, beta)
        assert translation.tokens == tokens
        assert translation.score == pytest.approx(score, abs=1e-4)


@torch.no_grad()
def test_a_beam_of_one_takes_the_likeliest_word():
    model = small().float()
    found = translate(model, sentences(), LENGTHS, begin=1, end=2, longest=torch.tensor([6, 2, 4]))
    memory = model.encode(sentences(), LENGTHS)
    for b, (translation, limit) in enumerate(zip(found, (6, 2, 4), strict=True)):
        said, total = [], 0.0
        while len(said) < limit and 2 not in said:
            logits, _, weights = model.decode(
                torch.tensor([[1, *said]]), type(memory)(*(part[b : b + 1] for part in memory))
            )
            logp = logits[0, -1].log_softmax(0)
            said.append(int(logp.argmax()))
            total += float(logp.max())
        seen = weights[0].sum(0)[: LENGTHS[b]].clamp(max=1).log().sum().item()
        assert translation.tokens == [token for token in said if token != 2]
        assert translation.score == pytest.approx(total / length_penalty(len(said), 0.6) + 0.1 * seen, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 3])
def test_who_is_done_leaves(beam, monkeypatch):
    """Sentences of very unequal limits find what each finds alone, and the last is not decoded among the others."""
    model, limits = small(), torch.tensor([30, 2, 3, 1, 2])
    source, lengths = torch.randint(3, 11, (5, 5)), torch.tensor([5, 2, 3, 1, 4])
    alone = [
        translate(
            model, source[b : b + 1, :n], lengths[b : b + 1], begin=1, end=2, beam=beam, longest=limits[b : b + 1]
        )
        for b, n in enumerate(lengths)
    ]
    rows, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda token, *rest: rows.append(len(token)) or decode(token, *rest))
    found = translate(model, source, lengths, begin=1, end=2, beam=beam, longest=limits)
    assert [each.tokens for each in found] == [each.tokens for (each,) in alone]
    assert [each.score for each in found] == pytest.approx([each.score for (each,) in alone], abs=1e-4)
    assert rows[0] == 5 * beam
    assert rows[3:] == [beam] * len(rows[3:])


@pytest.mark.parametrize("beam", [1, 4])
def test_a_sentence_without_numbers_is_named(beam):
    model = small().float()
    with torch.no_grad():
        model.source_embedding.weight[7] = math.nan
    source, lengths = torch.tensor([[4, 5, 3], [6, 5, 3], [6, 7, 3], [4, 4, 3]]), torch.tensor([3, 1, 3, 2])
    with pytest.raises(ValueError, match="the sentence at index 2 has no translation: .* NaN") as caught:
        translate(model, source, lengths, begin=1, end=2, beam=beam, longest=torch.tensor([1, 2, 9, 9]))
    assert caught.value.sentence == 2
    whole = torch.tensor([0, 1, 3])
    assert len(translate(model, source[whole], lengths[whole], begin=1, end=2, beam=beam)) == 3


@pytest.mark.parametrize("length", [1, 2, 5])
def test_numbers_that_end_later_are_named_too(length, monkeypatch):
    """What was found before they are NaN may not be the best."""
    model, decode, steps = small(), GNMT.decode, itertools.count(1)

    def failing(self, *inputs):
        logits, state, weights = decode(self, *inputs)
        logits[..., 2] += 1.0  # so that some translations end at once
        return logits * (math.nan if next(steps) == length else 1.0), state, weights

    monkeypatch.setattr(GNMT, "decode", failing)
    with pytest.raises(NotANumberError, match="index 0"):
        translate(model, sentences()[:1], LENGTHS[:1], begin=1, end=2, beam=3, longest=5, alpha=5.0)


def test_what_cannot_be_is_told():
    for options, message in (
        ({"num_layers": 1}, "num_layers must be a whole number of at least 2, got 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"mode": "exakt"}, "mode must be one of torch, exact"),
        ({"hidden_size": 0}, "hidden_size must be"),
        ({"padding": 99}, "padding must be a token, 0 to 10, got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    model = small()
    for source, lengths, options, message in (
        (sentences(), LENGTHS, {"beam": 0}, "beam must be a positive whole number, got 0"),
        (sentences(), LENGTHS, {"beam": 2.0}, "beam must be a positive whole number, got 2.0"),
        (sentences(), LENGTHS, {"beam": True}, "beam must be a positive whole number, got True"),
        (sentences(), LENGTHS, {"longest": 0}, "longest must be at least 1"),
        (sentences(), LENGTHS, {"longest": 3.5}, r"longest must be a whole number, or \(B,\) of them, got 3.5"),
        (sentences(), LENGTHS, {"longest": torch.tensor([4, 4])}, r"longest must .*, got tensor\(\[4, 4\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            translate(model, source, lengths, begin=1, end=2, **options)
    assert translate(model, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long), begin=1, end=2) == []


@pytest.mark.parametrize(
    ("source", "lengths", "error", "message"),
    [
        (sentences(), torch.tensor([5, 0, 3]), ValueError, "every sentence needs a token .* got a length of 0"),
        (sentences(), torch.tensor([5, 1, -3]), ValueError, "got a length of -3"),
        (sentences(), torch.tensor([5, 6, 3]), ValueError, "source has 5 tokens a sentence, got a length of 6"),
        (sentences(), torch.tensor([5.0, 1.0, 3.0]), ValueError, "lengths must be whole numbers, got torch.float32"),
        (
            sentences(),
            torch.tensor([5, 1]),
            ValueError,
            r"source must be \(B, S\) and lengths \(B,\), got \(3, 5\) and \(2,\)",
        ),
        (sentences()[0], LENGTHS, ValueError, r"source must be \(B, S\)"),
        (sentences(), [5, 1, 3], TypeError, "lengths must be a tensor, got list"),
        (sentences().tolist(), LENGTHS, TypeError, "source must be a tensor, got list"),
    ],
)
def test_sentences_that_cannot_be_are_told(source, lengths, error, message):
    model = small(num_layers=2)
    fast = CompiledGNMT(small(num_layers=2).float(), threads=1, tune_seconds=0.0)
    for call in (
        lambda: model(source, lengths, sentences()),
        lambda: translate(model, source, lengths, begin=1, end=2),
        lambda: fast.encode(source, lengths),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # PyTorch's of its own LSTM
def test_what_records_the_network_looks_at_no_lengths():
    model = small(num_layers=2)
    given = (sentences(), LENGTHS, sentences())
    wanted = model(*given)
    for recorded in (torch.jit.trace(model, given, check_trace=False), torch.export.export(model, given).module()):
        torch.testing.assert_close(recorded(*given), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.75])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(share, dtype):
    torch.manual_seed(0)
    layer = gnmt.Dropout(share)
    x = torch.ones(501, 201, dtype=dtype, requires_grad=True)
    y = layer(x)
    kept = torch.tensor(1 / (1 - share)).to(dtype)
    assert ((y == 0) | (y == kept)).all()
    # five standard deviations of the mean of so many
    assert abs((y == 0).double().mean().item() - share) <= 5 * (share * (1 - share) / x.numel()) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert share == 0 or not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert layer.eval()(x) is x
