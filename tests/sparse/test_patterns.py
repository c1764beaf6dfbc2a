"""N:M and blocks of four, and what the registry tells."""

import dataclasses
import inspect
import itertools
import re

import pytest
import torch
from torch import nn

from rarefy import sparse
from rarefy.sparse.methods.nm import best_of_each
from rarefy.sparse.registry import METHODS
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import CASES, Run


def test_best_of_each_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0, 6.0])
    assert best_of_each(scores, 2, 4).int().tolist() == [1, 0, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groups_go_along_the_inputs_of_a_convolution(layout):
    model = nn.Sequential(nn.Conv2d(8, 3, 3)).to(memory_format=layout)
    scores = model[0].weight.detach().abs()
    sparsifier = sparse.create("nm", model, total_steps=5, n=1, m=4)
    (mask,) = sparsifier.live_masks().values()
    groups = mask.view(3, 2, 4, 3, 3)
    assert (groups.sum(2) == 1).all()
    assert torch.equal(scores.reshape(3, 2, 4, 3, 3).argmax(2), groups.int().argmax(2))


def test_groups_go_along_the_inputs_of_convolutions_in_one_and_three_dimensions():
    model = nn.ModuleList([nn.Conv1d(8, 2, 3), nn.Conv3d(8, 2, 3)])
    one, three = sparse.create("nm", model, total_steps=5, n=1, m=4).live_masks().values()
    assert (one.view(2, 2, 4, 3).sum(2) == 1).all()
    assert (three.view(2, 2, 4, 3, 3, 3).sum(2) == 1).all()


def test_sr_ste_by_hand():
    run = ByHand("nm", [[4.0, -3.0, 2.0, -1.0]], refinement=0.25, lr=1.0)
    assert run.used == [4.0, -3.0, 0.0, 0.0]
    # dL/dW^ + lambda (1 - M) W
    assert run.step() == [1.0, 1.0, 1 + 0.25 * 2, 1 - 0.25]
    assert run.used == [3.0, -4.0, 0.0, 0.0]
    run.rest()
    assert run.dense.tolist() == [[3.0, -4.0, 2 - 1 - 0.5, -1 - 1 + 0.25]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8)])
def test_every_group_has_its_n_in_every_step_and_at_the_end(n, m):
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 8))
    sparsifier = sparse.create("nm", model, total_steps=5, n=n, m=m)
    assert sparsifier.sparsity() == pytest.approx(1 - n / m)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 6, 6)).square().mean().backward()
        optimizer.step()
        assert ((model[0].weight != 0).view(6, 8 // m, m, 3, 3).sum(2) == n).all()
    sparsifier.finalize()
    assert ((model[2].weight != 0).view(8, 96 // m, m).sum(2) == n).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4, "m": 4}, "n and m must be whole numbers with 0 < n < m"),
        ({"n": 1.5}, "n and m must be whole numbers with 0 < n < m"),
        ({"refinement": -1.0}, "refinement must be a finite number that is not negative"),
        ({"target": 0.9}, "unknown option of NM: 'target'"),
        ({"m": 8}, r"layer '0' has 4 inputs.*groups of 8 do not divide; pass exclude=\['0'\]"),
    ],
)
def test_mistakes(options, message):
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=message):
        sparse.create("nm", model, total_steps=10, **options)


def test_autosparse_thresholds_blocks_by_their_mean():
    weight = [[2.0, -1.0, 1.0, 0.0, 0.5, -0.5, 0.1, 0.1]]
    # T = 1/2; the means are 1 and 0.3
    options = {"total_steps": 1000, "block": 4, "alpha": 0.5, "anneal": "constant", "pressure": 0.0, "floor": 0.0}
    run = ByHand("autosparse", weight, lr=0.01, **options)
    run.put("own.s", 0.0)
    assert run.used == [1.0, -0.5, 0.5, 0, 0, 0, 0, 0]
    assert run.step() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    # s - lr / sqrt(4) dL/ds, dL/ds = -g'(0) (sum of W/B over the first block + alpha * that of the second)
    assert run.kept("own.s").item() == pytest.approx(0.01 / 2 * 0.25 * (2.0 + 0.5 * 0.2 / 0.3))


def test_blocks_of_equal_weights_are_the_single_weights_but_for_the_pace_of_the_threshold():
    weight = torch.randn(8, 1).expand(8, 4)
    seen = []
    for block in (1, 4):
        options = {"block": block, "alpha": 0.3, "anneal": "constant", "pressure": 0.0, "total_steps": 1000}
        run = ByHand("autosparse", weight, lr=0.01, **options)
        run.put("own.s", -1.0)
        used = run.model[0].weight.detach().clone()
        run.step(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        # what s moved, times the root of the block's size
        seen.append((used, run.gradient, (run.kept("own.s") + 1.0) * block**0.5))
    for single, blocks in zip(*seen, strict=True):
        torch.testing.assert_close(single, blocks)


@pytest.mark.parametrize("method", ["autosparse", "str"])
@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_the_trim_comes_down_to_the_target_and_does_not_swing_about_it(method, block):
    weight = 0.1 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    run = ByHand(method, weight, target=0.9, total_steps=125, pressure=0.0, block=block)
    densities = []
    for _ in range(124):
        run.rest()
        densities.append(1.0 - run.sparsifier.sparsity())
    assert densities[0] > 0.9
    # Whole blocks are 1/1024 of the layer where they are of 16.
    assert all(after < before + 0.002 for before, after in itertools.pairwise(densities))
    assert 0.098 < densities[-1] < 0.106


def test_the_limit_on_what_a_step_moves_is_that_of_single_weights_over_the_root_of_the_block():
    for block, limit in [(1, 0.2), (4, 0.1), (16, 0.05)]:
        weight = torch.ones(2, 16)
        run = ByHand("autosparse", weight, lr=1e3, block=block, pressure=0.0, alpha=1.0, anneal="constant")
        before = run.kept("own.s").item()
        run.step()
        assert run.kept("own.s").item() - before == pytest.approx(limit, rel=1e-5)


def test_autosparse_lands_in_whole_blocks():
    run = Run("autosparse-block", total_steps=60).train(60)
    model = run.sparsifier.finalize()
    for name in ("3", "6", "8"):
        weight = model.get_submodule(name).weight
        counts = (weight != 0).view(weight.shape[0], -1, 4, weight[0, 0].numel()).sum(2)
        assert set(counts.flatten().tolist()) <= {0, 4}


def test_blocks_that_do_not_divide_are_told_by_name():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"layer '0' has 1 inputs.*pass exclude=\['0'\]"):
        sparse.create("autosparse", model, total_steps=10, target=0.9, block=4)
    with pytest.raises(ValueError, match="backward_density chooses single weights"):
        sparse.create("autosparse", model, total_steps=10, block=4, exclude=["0"], backward_density=0.5)


def test_the_list_tells_about_every_method():
    details = sparse.list_methods(details=True)
    assert list(details) == sparse.list_methods()
    assert sparse.list_methods("s*") == ["set", "snfs", "st3", "static", "str"]
    for name, info in details.items():
        assert info.start in ("dense", "sparse"), name
        assert info.targeted in ("always", "optional", "never"), name
        assert info.title
        assert info.paper
        assert info.training_flops
    assert {name for name, _ in CASES.values()} == set(details), "every method is in the survival matrix"


@pytest.mark.parametrize("name", sparse.list_methods())
def test_what_the_list_says_of_the_target_is_so(name):
    targeted = sparse.list_methods(name, details=True)[name].targeted
    model = nn.Sequential(nn.Linear(16, 16))
    if targeted == "always":
        with pytest.raises(ValueError, match="needs a target"):
            sparse.create(name, model, total_steps=100)
    else:
        sparse.create(name, model, total_steps=100)
    assert ("target" in sparse.options(name)) == (targeted != "never")


@pytest.mark.parametrize("name", sparse.list_methods())
def test_start_is_what_the_list_says(name):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    target = {"target": 0.9} if "target" in sparse.options(name) else {}
    sparsifier = sparse.create(name, model, total_steps=100, **target)
    sparse_at_once = sparsifier.sparsity() > 0.3
    assert sparse_at_once == (sparse.list_methods(name, details=True)[name].start == "sparse")


@pytest.mark.parametrize("name", sparse.list_methods())
def test_help_tells_every_option_and_its_default(name):
    method = METHODS[name]
    told = re.search(r"\n\nArgs:\n((?:    .*\n?)+)", method.__doc__)[1]
    entries = {}
    for entry in re.split(r"^    (?=\S)", told, flags=re.MULTILINE)[1:]:
        about, text = entry.split(": ", 1)
        for index, option in enumerate(about.split(", ")):
            default = re.search(r" Default: (.*)\.\s*$", text)
            entries[option] = default and (default[1].split(", ")[index] if ", " in about else default[1])
    options = sparse.options(name)
    assert list(entries) == ["model", *options]
    for option, default in options.items():
        expected = None if default is dataclasses.MISSING else repr(default)
        assert entries[option] == expected, option
    parameters = inspect.signature(method).parameters.values()
    assert options == {
        p.name: dataclasses.MISSING if p.default is p.empty else p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["model"]
