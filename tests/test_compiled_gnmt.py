"""GNMT on the engine against GNMT: what it reads, says and finds."""

import pytest
import torch

from rarefy.act.spec.reference import MODES
from rarefy.models import GNMT
from rarefy.models import compiled as module
from rarefy.models.compiled import CompiledGNMT
from rarefy.models.search import translate

VOCABULARY = 23


def network(mode: str = "torch", **options) -> GNMT:
    """A small network, half of whose weights are zero."""
    torch.manual_seed(0)
    model = GNMT(VOCABULARY, **{"hidden_size": 16, "num_layers": 3, "mode": mode, **options}).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if weight.dim() == 2 and "embedding" not in name:
            weight.mul_(torch.rand(weight.shape) < 0.5)
    return model


def sentences(batch: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(1, longest + 1, (batch,))
    lengths[0] = longest
    source = torch.randint(3, VOCABULARY, (batch, longest))
    return source.where(torch.arange(longest) < lengths.unsqueeze(1), 0), lengths


@pytest.mark.parametrize(("mode", "options"), [("torch", {}), ("exact", {"shared_embedding": False}), ("hard", {})])
def test_it_says_what_the_network_says(mode, options, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", (4,))
    model = network(mode, **options)
    fast = CompiledGNMT(model, threads=1, tune_seconds=0.0)
    for batch, longest in ((3, 3), (5, 11)):
        source, lengths = sentences(batch, longest)
        memory, own = model.encode(source, lengths), fast.encode(source, lengths)
        real = ~memory.padding
        torch.testing.assert_close(own.values[real], memory.values[real], atol=2e-5, rtol=1e-4)
        keys = memory.keys + model.decoder.attention.bias
        torch.testing.assert_close(own.keys[real], keys[real], atol=2e-5, rtol=1e-4)
        assert torch.equal(own.padding, memory.padding)
        state = after = None
        for _ in range(3):
            token = torch.randint(VOCABULARY, (batch, 1))
            logits, state, weights = model.decode(token, memory, state)
            got, after, looked = fast.decode(token, own, after)
            torch.testing.assert_close(got, logits, atol=5e-5, rtol=1e-4)
            torch.testing.assert_close(looked, weights, atol=1e-5, rtol=1e-4)
            for (h, c), (own_h, own_c) in zip(state, after, strict=True):
                torch.testing.assert_close(own_h, h, atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(own_c, c, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["torch", *MODES])
def test_greedy_translations_are_the_same(mode, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", (16,))
    model = network(mode, hidden_size=32)
    fast = CompiledGNMT(model, threads=1, tune_seconds=0.0)
    source, lengths = sentences(16, 9)
    expected = translate(model, source, lengths, begin=1, end=2)
    found = translate(fast, source, lengths, begin=1, end=2)
    assert [each.tokens for each in found] == [each.tokens for each in expected]


def test_the_search_finds_the_same(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", (1, 4))  # so that few parts are compiled, and some batches are in groups
    model = network(num_layers=2)
    fast = CompiledGNMT(model, threads=1, tune_seconds=0.0)
    for batch, beam in ((1, 1), (1, 4), (7, 1), (6, 3)):
        source, lengths = sentences(batch, 9)
        expected = translate(model, source, lengths, begin=1, end=2, beam=beam)
        found = translate(fast, source, lengths, begin=1, end=2, beam=beam)
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-4)
    assert {size for _, size in fast._engines} == {1, 4}


def test_what_it_does_not_take():
    with pytest.raises(TypeError, match="GNMT, got Linear"):
        CompiledGNMT(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="training mode"):
        CompiledGNMT(network().train())
    with pytest.raises(ValueError, match="in float32, 'source_embedding.weight' is torch.float64"):
        CompiledGNMT(network().double())
    fast = CompiledGNMT(network(num_layers=2), threads=1, tune_seconds=0.0)
    with pytest.raises(ValueError, match=r"one token of each sentence, \(B, 1\), got \(2, 3\)"):
        fast.decode(torch.ones(2, 3, dtype=torch.long), fast.encode(*sentences(2, 3)))


def test_its_examples_are_its_own():
    source, made = torch.full((2, 3), 4), []
    model = network(num_layers=2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(CompiledGNMT(model, threads=1, tune_seconds=0.0).encode(source, torch.full((2,), 3)).values)
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*made)


def test_ktanh_compiles_where_rounding_goes_over_its_jumps():
    torch.manual_seed(1)
    model = GNMT(200, hidden_size=64, num_layers=3, mode="ktanh").eval()
    fast = CompiledGNMT(model, threads=1, tune_seconds=0.0)
    assert fast.encode(torch.randint(4, 200, (64, 8)), torch.full((64,), 8)).values.isfinite().all()
