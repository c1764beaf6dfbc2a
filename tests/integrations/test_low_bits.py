"""Optimizers that keep their states in 8 and 4 bits: torchao's, and one whose codes nobody else knows."""

import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from tests.sparse.methods import CASES, EVERY

#: Weights of fewer numbers torchao keeps in 32 bits.
WIDTH = 64
STEPS = 12

#: The cases whose targets are made for this network, too.
PLAIN = [case for case, (_, options) in CASES.items() if not {"target_flops", "target_ms", "block"} & set(options)]


@pytest.fixture(scope="module")
def torchao():
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries for other machines that it cannot load
    pytest.importorskip("torchao")
    import torchao.optim

    logging.disable(level)
    with torch.compiler.set_stance("force_eager"):  # their steps, which compile for minutes
        yield torchao.optim


class Bytes(torch.optim.Optimizer):
    """SGD with a momentum of bytes, as of bitsandbytes: a code is a place in a table, in whose middle 0 stands."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.table = torch.linspace(-1.0, 1.0, 255)

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["code"], state["most"] = torch.full_like(parameter, 127, dtype=torch.uint8), torch.ones(())
            momentum = 0.9 * self.table[state["code"].long()] * state["most"] + parameter.grad
            state["most"] = momentum.abs().max().clamp(min=1e-12)
            state["code"] = torch.bucketize(momentum / state["most"], self.table).clamp(max=254).to(torch.uint8)
            parameter.sub_(momentum, alpha=self.param_groups[0]["lr"])


def start(case, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU())
    model.append(nn.Linear(2 * WIDTH, 4))
    optimizer = kind(model.parameters())
    method, options = CASES[case]
    return model, optimizer, sparse.create(method, model, total_steps=STEPS, **options).attach(optimizer)


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(32, WIDTH, generator=generator), torch.randint(4, (32,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["AdamW8bit", pytest.param("AdamW4bit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [each for each in EVERY if each.values[0] in PLAIN])
def test_states_of_8_and_4_bits(torchao, case, kind):
    def make(parameters):
        return getattr(torchao, kind)(parameters, lr=1e-3)

    model, optimizer, sparsifier = start(case, make)
    for number in range(STEPS // 2):
        step(model, optimizer, number)
    checkpoint = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, sparsifier)], checkpoint)
    states = torch.load(io.BytesIO(checkpoint.getvalue()))
    resumed, again, other = start(case, make)
    for what, state in zip((resumed, again, other), states, strict=True):
        what.load_state_dict(state)
    for number in range(STEPS // 2, STEPS):
        step(model, optimizer, number)
        step(resumed, again, number)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    if "target" in CASES[case][1]:
        sparsifier.finalize()
        assert sparsifier.sparsity() == pytest.approx(CASES[case][1]["target"], abs=2e-3)


def test_what_comes_back_starts_without_momentum(torchao):
    model, optimizer, sparsifier = start("rigl", lambda p: torchao.AdamW8bit(p, lr=1e-3))
    weight = model[2].weight
    for number in range(3):
        step(model, optimizer, number)
    (bucket,) = sparsifier._buckets
    layer = next(layer for layer in bucket.layers if layer.name == "2")
    where = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    before = optimizer.state[weight]["exp_avg"].dequantize()
    assert before[where].count_nonzero()
    bucket.forget(layer, torch.zeros_like(where))
    assert torch.equal(optimizer.state[weight]["exp_avg"].dequantize(), before), "rounded for nothing"
    bucket.forget(layer, where)
    after = optimizer.state[weight]["exp_avg"].dequantize()
    assert not after[where].any()
    assert torch.equal(after[~where] == 0.0, before[~where] == 0.0)
    torch.testing.assert_close(after[~where], before[~where], rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("case", ["set", "rigl", "gmp", "autosparse-accuracy"])
def test_codes_are_left_to_the_optimizer(case):
    # 0 in such a code is the most negative momentum: filled with it, weights that come back would be thrown far up.
    model, optimizer, sparsifier = start(case, Bytes)
    largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
    for number in range(STEPS):
        step(model, optimizer, number)
    sparsifier.finalize()
    assert sparsifier.sparsity() == pytest.approx(0.9, abs=2e-3)
    assert max(float(weight.detach().abs().max()) for weight in model.parameters()) < 2.0 * largest
