"""Exact counts, deterministic ties, budgets with unequal costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy._prices import Prices
from rarefy.sparse.masks import top_k, within_budget


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.data())
def test_top_k_is_exact_and_ties_go_to_the_lower_index(values, data):
    k = data.draw(st.integers(0, len(values)))
    mask = top_k(torch.tensor(values, dtype=torch.float32), k)
    by_hand = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert mask.nonzero().flatten().tolist() == sorted(by_hand)


def test_top_k_refuses_an_impossible_k():
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\].*got 5"):
        top_k(torch.zeros(2, 2), 5)


def test_equal_costs_keep_exactly_the_budget():
    scores = [torch.rand(7, 3), torch.rand(50)]
    for budget in range(2, 72):
        masks = within_budget(scores, [Prices.one(1.0, 21), Prices.one(1.0, 50)], float(budget), [1, 1])
        assert sum(int(mask.sum()) for mask in masks) == min(budget, 71)


def test_floors_hold_even_against_better_scores():
    low, high = torch.arange(10.0), 100 + torch.arange(90.0)
    masks = within_budget([low, high], [Prices.one(1.0, 10), Prices.one(1.0, 90)], 20.0, [4, 1])
    assert [int(mask.sum()) for mask in masks] == [4, 16]
    assert masks[0].nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_unequal_costs_stop_at_the_first_that_does_not_fit():
    cheap, dear = torch.tensor([5.0, 1.0]), torch.tensor([4.0, 3.0])
    masks = within_budget([cheap, dear], [Prices.one(1.0, 2), Prices.one(10.0, 2)], 15.0, [0, 0])
    assert [mask.tolist() for mask in masks] == [[True, False], [True, False]]


def test_a_budget_below_the_floors_is_refused():
    with pytest.raises(ValueError, match="floors alone cost 6, more than the budget of 5"):
        within_budget([torch.rand(4), torch.rand(4)], [Prices.one(1.0, 4)] * 2, 5.0, [3, 3])
