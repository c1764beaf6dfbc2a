"""Sums of products: right for every assignment, irredundant, and within every interval of a relation."""

import random

import numpy as np
import pytest

from rarefy.rtl.logic.covers import Cover, Relation, between, isop, pack, unpack


def value(cubes, variables):
    return Cover(cubes).evaluate(variables)


def test_two_functions_by_hand():
    # a & b of (a, b, c): bit i of the table is the assignment i, a its lowest bit
    both = sum(1 << i for i in range(8) if i & 1 and i & 2)
    assert isop(both, both, 3) == ((((1, 1), (0, 1)),), both)
    # anything from "a & b" to "a": the single literal a is enough
    only_a = sum(1 << i for i in range(8) if i & 1)
    assert isop(both, only_a, 3) == ((((0, 1),),), only_a)
    assert isop(0, only_a, 3) == ((), 0)
    assert isop(both, 255, 3) == (((),), 255)


def test_a_cover_lies_between_and_has_no_product_to_spare():
    rng = np.random.default_rng(0)
    for variables in (1, 3, 6):
        for _ in range(20):
            least = rng.random(1 << variables) < 0.3
            most = least | (rng.random(1 << variables) < 0.4)
            cubes, table = isop(pack(least), pack(most), variables)
            found = value(cubes, variables)
            assert np.array_equal(found, unpack(table, found.size))
            assert not (least & ~found).any()
            assert not (found & ~most).any()
            for i in range(len(cubes)):
                assert (least & ~value(cubes[:i] + cubes[i + 1 :], variables)).any()


def test_any_order_and_either_polarity_give_the_function_they_say():
    rng, draw = np.random.default_rng(1), random.Random(1)
    for _ in range(20):
        least = rng.random(64) < 0.3
        most = least | (rng.random(64) < 0.3)
        for inverted in (False, True):
            cover, said = between(least, most, draw.sample(range(6), 6), inverted)
            assert cover.inverted is inverted
            assert np.array_equal(cover.evaluate(6), said)
            assert not (least & ~said).any()
            assert not (said & ~most).any()


def test_a_choice_keeps_to_every_interval_and_revising_does_too():
    rng = np.random.default_rng(2)
    least = rng.integers(0, 200, 256)
    most = np.minimum(least + rng.integers(0, 60, 256), 255)
    relation, draw = Relation(least, most, 8, [-i for i in range(8)]), random.Random(0)
    choice = relation.choose(draw)
    for _ in range(5):
        bits = sum(cover.evaluate(8).astype(np.int64) << i for i, cover in enumerate(choice.covers))
        assert np.array_equal(bits, choice.values)
        assert ((least <= bits) & (bits <= most)).all()
        choice = relation.revise(choice, draw.sample(range(8), 3), draw)
    below = relation.choose(draw, choice, 3)
    assert np.array_equal(below.values >> 4, choice.values >> 4)
    assert ((least <= below.values) & (below.values <= most)).all()


def test_freedom_is_used():
    # numbers that may each be off by 8
    exact, draw = np.arange(256), random.Random(0)
    tight = Relation(exact, exact, 8, [-i for i in range(8)]).choose(draw)
    assert tight.cost == 8 * 2  # every bit is its own variable: a product of one literal
    free = Relation(np.maximum(exact - 8, 0), np.minimum(exact + 8, 255), 8, [-i for i in range(8)]).choose(draw)
    assert free.cost < tight.cost


def test_empty_intervals_and_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="2 variables have 4 assignments, got 3 intervals"):
        Relation(np.zeros(3, dtype=int), np.ones(3, dtype=int), 1, [0, 1])
    with pytest.raises(ValueError, match="must hold a number of 2 bits"):
        Relation(np.array([0, 3]), np.array([1, 2]), 2, [0])
    with pytest.raises(ValueError, match="must hold a number of 2 bits"):
        Relation(np.array([0, 4]), np.array([1, 5]), 2, [0])
