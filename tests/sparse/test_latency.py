"""Budgets in milliseconds: prices that change with how many weights live, exact landing, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rarefy import AutoSparse, sparse
from rarefy._prices import Prices
from rarefy.latency import Latency, LayerLatency
from rarefy.sparse.masks import within_budget
from tests.sparse.methods import CASES, Run, create, latency, network

TABLE = LayerLatency("x", 100, (0.0, 0.1, 0.5, 1.0), (0.001, 0.003, 0.005, 0.005))


def several(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    each = draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths)))
    return Prices(tuple(sum(lengths[: i + 1]) for i in range(len(lengths))), tuple(each))


some_prices = st.composite(several)()


def test_prices_follow_the_table():
    prices = TABLE.prices(1)
    assert prices.ends == (10, 50, 100)
    assert [prices.cost(live) for live in (0, 10, 30, 50, 99)] == pytest.approx([0, 0.002, 0.003, 0.004, 0.004])
    assert (prices.next(9), prices.next(10), prices.next(50)) == pytest.approx((0.0002, 0.00005, 0.0))


def test_a_small_layer_keeps_the_ends_of_its_table():
    tiny = LayerLatency("x", 3, (0.0, 0.02, 0.1, 0.2, 1.0), (0.001, 0.002, 0.003, 0.004, 0.009)).prices(1)
    assert tiny.cost(0) == 0
    assert tiny.cost(3) == pytest.approx(0.008)
    assert tiny.ends == (1, 3)


@given(some_prices, st.data())
def test_a_purse_pays_for_what_costs_no_more(prices, data):
    live = data.draw(st.integers(0, prices.size))
    purse = data.draw(st.integers(0, 60))
    more = prices.affordable(live, purse)
    assert prices.cost(live + more) - prices.cost(live) <= purse
    if live + more < prices.size:
        assert prices.cost(live + more + 1) - prices.cost(live) > purse
    assert sum(prices.next(count) for count in range(live)) == prices.cost(live)


@given(st.lists(some_prices, min_size=1, max_size=3), st.integers(0, 99), st.integers(0, 5))
def test_the_best_weights_are_taken_until_one_does_not_fit(prices, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 9, (each.size,), generator=generator).double() for each in prices]
    order = sorted((-float(s), layer, i) for layer, row in enumerate(scores) for i, s in enumerate(row))
    counts, spent = [0] * len(prices), 0
    for _, layer, _ in order:
        spent += prices[layer].next(counts[layer])
        if spent > budget:
            break
        counts[layer] += 1
    if not sum(each.cost(each.size) for each in prices):
        return
    masks = within_budget(scores, prices, float(budget), [0] * len(prices))
    assert [int(mask.sum()) for mask in masks] == counts


def budget_of(model=None, **options):
    return AutoSparse(model or network(), total_steps=100, latency=latency(), **{"target_ms": 1.5, **options}).budget


def test_density_is_that_of_all_layers_alike():
    budget, sizes = budget_of(), [288, 1152, 384, 224]
    for density in (0.1, 0.25, 0.5):
        live = [density * size for size in sizes]
        assert budget.density(live) == pytest.approx(density)
        assert budget.available_at(density) + budget.fixed == pytest.approx(budget.cost(live))
    assert budget.density(sizes) == 1.0
    assert budget.total == pytest.approx(0.003)
    assert budget.cost([0, 0, 0, 0]) == pytest.approx(0.00075)  # what is fixed, and the least of every layer
    assert budget.available + budget.fixed == pytest.approx(0.0015)


def test_where_weights_cost_nothing_the_density_is_the_highest():
    table = Latency((TABLE,), 0.001, "float32", (1, 1), {})
    budget = AutoSparse(
        nn.Sequential(nn.Linear(10, 10)), total_steps=9, include=["0"], target_ms=5, latency=named(table, "0")
    ).budget
    assert budget.density([50]) == budget.density([80]) == 1.0
    assert budget.density([30]) == pytest.approx(0.3)


def named(table, name):
    layers = [LayerLatency(name, each.weights, each.densities, each.seconds) for each in table.layers]
    return Latency(tuple(layers), table.fixed, table.precision, table.block, table.about)


@pytest.mark.parametrize("name", ["gmp", "rigl", "topk", "dst", "cs", "granet", "static", "st3"])
@pytest.mark.parametrize("target", [0.9, 2.2])
def test_every_family_lands_on_its_milliseconds(name, target):
    torch.manual_seed(0)
    model = network()
    sparsifier = sparse.create(name, model, total_steps=40, target_ms=target, latency=latency())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 8, 8)).square().mean().backward()
        optimizer.step()
    model = sparsifier.finalize()
    live = {layer: int(model.get_submodule(layer).weight.count_nonzero()) for layer in ("0", "3", "6", "8")}
    assert 0.98 * target <= 1000 * latency().seconds(live) <= target * (1 + 1e-9)


def test_blocks_land_too():
    run = Run("autosparse-ms", latency=latency(block=(1, 4)), block=4, exclude=["0"]).train(200)
    model = run.sparsifier.finalize()
    live = {name: int(model.get_submodule(name).weight.count_nonzero()) for name in ("3", "6", "8")}
    assert all(count % 4 == 0 for count in live.values())
    assert 1.47 <= 1000 * latency(block=(1, 4)).seconds(live) <= 1.5


def test_a_layer_that_nothing_uses_takes_all_its_time():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x):
            return self.used(x)

    model = Half()
    layers = tuple(named(Latency((TABLE,), 0.0, "float32", (1, 1), {}), name).layers[0] for name in ("used", "unused"))
    sparsifier = AutoSparse(model, total_steps=20, target_ms=8, latency=Latency(layers, 0.0, "float32", (1, 1), {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(4, 10)).square().mean().backward()
    with pytest.warns(UserWarning, match="no gradient in the first step"):
        optimizer.step()
    with pytest.warns(UserWarning, match="at once"):
        sparsifier.finalize()
    assert int(model.used.weight.count_nonzero()) == 10  # 0.003, beside 0.005 of the whole other one


def test_a_run_goes_on_to_the_same_bits():
    whole, half = Run("autosparse-ms").train(200), Run("autosparse-ms").train(90)
    state, weights = half.sparsifier.state_dict(), half.plain.state_dict()
    other = Run("autosparse-ms")
    other.plain.load_state_dict(weights)
    other.sparsifier.load_state_dict(state)
    other.optimizer.load_state_dict(half.optimizer.state_dict())
    for step in range(90, 200):
        images, labels = other.batch(step)
        other.optimizer.zero_grad()
        nn.functional.cross_entropy(other.model(images), labels).backward()
        other.optimizer.step()
    assert other.sparsifier.layers() == whole.sparsifier.layers()


MISTAKES = {
    "no table": ({"latency": None}, r"target_ms needs latency.*engine.latency\(model, example_input\), got None"),
    "no target": ({"target_ms": None, "target": 0.9}, "give it with target_ms"),
    "two targets": ({"target": 0.9}, "one of target .*, not both target and target_ms"),
    "below": ({"target_ms": 0.5}, r"target_ms=0.5 cannot be reached.*from 0.7\d+ ms.*to 3 ms"),
    "above": ({"target_ms": 3.0}, r"target_ms=3 leaves nothing to prune: .* 3 ms with all its weights; ask for fewer"),
    "negative": ({"target_ms": -1.0}, "target_ms must be a finite number above 0, got -1"),
    "floor": ({"floor": 0.5, "target_ms": 1.0}, r"target_ms=1 cannot be reached.*from 2.351 ms"),
    "block": ({"block": 4, "exclude": ["0"]}, r"of block=\(1, 1\), and block=\(1, 4\).*block=\(1, 4\)\)"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        create("autosparse-ms", network(), **options)


def test_a_table_of_another_network_is_refused():
    one, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer '0' has 16 weights, and 288 in the latency"):
        AutoSparse(one, total_steps=9, target_ms=1.5, latency=latency())
    with pytest.raises(ValueError, match=r"layer '1' is not in the latency.*exclude=\['1'\]"):
        AutoSparse(other, total_steps=9, target_ms=1.5, latency=latency())


def test_layers_that_are_left_out_stay_whole():
    budget = budget_of(exclude=["3"], target_ms=2.5)
    assert budget.fixed == pytest.approx(0.0003 + 0.0015 + 0.0001 + 0.00005 + 0.0002)
    with pytest.raises(ValueError, match=r"cannot be reached.*from 2.1"):
        budget_of(exclude=["3"], target_ms=2.0)


def test_all_methods_with_targets_take_milliseconds():
    for name, (method, options) in CASES.items():
        if "target" in options:
            others = {key: value for key, value in options.items() if key != "target"}
            table = latency(block=options.get("block", (1, 1)))
            found = sparse.create(method, network(), total_steps=100, target_ms=1.5, latency=table, **others)
            assert found.budget.kind == "ms", name
            assert math.isclose(found.budget.asked, 1.5)
