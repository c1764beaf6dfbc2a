"""Methods with hard masks: update rules by hand, exact counts in every step, fresh state of what comes back."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import cost, sparse
from rarefy.sparse.masks import drop_and_grow
from rarefy.sparse.schedules import cosine_decay, cubic_ramp
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import Run, batch

FIXED = ("static", "set", "rigl", "snfs", "mest")
HARD = (*FIXED, "gmp", "gmp-flops", "mest-soft", "granet", "acdc")


def live(run):
    return [layer.live for layer in run.sparsifier.layers()]


def weights(run):
    return [run.plain.get_submodule(layer.name).weight for layer in run.sparsifier.layers()]


def masks(run):
    return [mask.clone() for mask in run.sparsifier.live_masks().values()]


@pytest.mark.slow
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("case", HARD)
def test_nothing_lives_outside_the_masks_in_any_step(case, adam):
    run = Run(case, total_steps=60, adam=adam)
    for _ in range(60):
        run.train(1)
        for weight, mask in zip(weights(run), masks(run), strict=True):
            assert not weight[~mask].any()
    assert run.sparsifier.budget.density(live(run)) <= run.sparsifier.budget.goal + 1e-12


@pytest.mark.parametrize("case", FIXED)
def test_sparse_to_sparse_counts_stay_exact_in_every_step(case):
    run = Run(case, total_steps=60)
    first = live(run)
    total = sum(weight.numel() for weight in weights(run))
    assert sum(first) == math.floor(0.1 * total + 1e-9)
    moved = 0
    for _ in range(60):
        before = masks(run)
        assert live(run.train(1)) == first
        moved += sum(int((a ^ b).sum()) for a, b in zip(before, masks(run), strict=True))
    assert (moved == 0) == (case == "static")


@pytest.mark.parametrize("case", ["gmp", "granet"])
def test_gradual_counts_follow_the_schedule_exactly(case):
    run = Run(case, total_steps=100, update_every=10)
    total = sum(weight.numel() for weight in weights(run))
    for step in range(1, 101):
        run.train(1)
        # as of the last update, and none is left out between the ramp's end and the goal
        at = step // 10 / 10
        if case == "gmp":
            density = 1 - 0.9 * cubic_ramp(at, 0.05, 0.6)
        else:
            density = 0.5 - 0.4 * cubic_ramp(at, 0.0, 0.6)
        assert sum(live(run)) == math.floor(density * total + 1e-6), step


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global", {"0": 0.5}])
def test_gmp_lands_with_every_distribution(distribution):
    run = Run("gmp", total_steps=40, distribution=distribution).train(40)
    assert run.sparsifier.sparsity() == pytest.approx(0.9, abs=1e-3)
    densities = [layer.density for layer in run.sparsifier.layers()]
    if distribution == "uniform":
        assert densities == pytest.approx([0.1] * 4, abs=0.01)
    if isinstance(distribution, dict):
        assert densities[0] == pytest.approx(0.5, abs=0.01)


def test_gmp_keeps_the_largest_of_all_layers():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -7.0, 6.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[-5.0, 2.0, 3.0, 4.0]]))
    sparsifier = sparse.create("gmp", model, target=0.5, total_steps=10, start=0.0, end=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    optimizer.step()
    assert model[0].weight.tolist() == [[8.0, -7.0, 6.0, 0.0]]
    assert model[1].weight.tolist() == [[-5.0, 0.0, 0.0, 0.0]]


def test_drop_and_grow_by_hand():
    weight = torch.tensor([[0.0, -3.0, 1.0, 2.0, 0.0, 0.0, 4.0, 0.0]])
    mask = torch.tensor([[False, True, True, True, False, False, True, False]])
    growth = torch.tensor([[1.0, 99.0, 2.0, 99.0, 5.0, 3.0, 99.0, 0.0]])
    magnitude = weight.abs().masked_fill(~mask, -1)
    # half of 4 live: 1 and 2 (at 2 and 3) go; of all that do not live then, 99 (at 3) and 5 (at 4) come
    new = drop_and_grow(magnitude, mask, growth, 0.5)
    assert new.int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 0]]
    assert torch.equal(drop_and_grow(magnitude, mask, growth, 0.0), mask)


def test_drop_and_grow_moves_no_more_than_there_is_room_for():
    mask = torch.tensor([[True] * 7 + [False]])
    new = drop_and_grow(torch.arange(8.0).view(1, 8).masked_fill(~mask, -1), mask, torch.rand(1, 8) + mask * 0.0, 0.9)
    assert int(new.sum()) == 7


def test_cosine_decay_is_rigls():
    assert cosine_decay(0.3, 0.0, 0.75) == pytest.approx(0.3)
    assert cosine_decay(0.3, 0.375, 0.75) == pytest.approx(0.15)
    assert cosine_decay(0.3, 0.75, 0.75) == cosine_decay(0.3, 0.9, 0.75) == 0.0


def one_layer(method, **options):
    """2 x 6 with 4 live weights."""
    options = {"target": 2 / 3, "total_steps": 100, "update_every": 5, **options}
    return ByHand(method, torch.ones(2, 6), lr=1e-6, momentum=0.9, **options)


def step(run, gradient):
    """A step under the loss sum of G * W, whose gradient is G."""
    run.optimizer.zero_grad()
    (run.model[0].weight * gradient).sum().backward()
    run.optimizer.step()


def test_masked_weights_get_no_gradient():
    run = ByHand("static", torch.ones(2, 6), target=2 / 3)
    step(run, torch.ones(2, 6))
    assert torch.equal(run.gradient, run.mask.float())


def test_rigl_grows_where_the_gradient_is_largest():
    run = one_layer("rigl", drop_fraction=0.5)
    old, weight = run.mask, run.model[0].weight
    with torch.no_grad():
        weight[old] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    gradient = torch.zeros(2, 6)
    dead = (~old).nonzero()
    gradient[tuple(dead[2])] = -5.0
    for _ in range(5):
        step(run, gradient)
    # f(5 / 100) of 4 live is 1.97 of them: one
    new = run.mask
    assert (old & ~new).nonzero().tolist() == [old.nonzero()[3].tolist()]
    assert (new & ~old).nonzero().tolist() == [dead[2].tolist()]
    assert weight[tuple(dead[2])] == 0.0


def test_rigl_looks_at_one_gradient_and_snfs_at_their_mean():
    grown = {}
    for method in ("rigl", "snfs"):
        run = one_layer(method, drop_fraction=0.5)
        old = run.mask
        lasting, last = torch.zeros(2, 6), torch.zeros(2, 6)
        dead = (~old).nonzero()
        lasting[tuple(dead[0])], last[tuple(dead[1])] = 2.0, 3.0
        for index in range(5):
            step(run, last if index == 4 else lasting)
        grown[method] = (run.mask & ~old).nonzero().tolist()
    assert grown == {"rigl": [dead[1].tolist()], "snfs": [dead[0].tolist()]}


def test_what_grows_is_a_method_that_can_be_asked():
    run = one_layer("set")
    first, second = run.sparsifier.growth_scores()[0], run.sparsifier.growth_scores()[0]
    assert torch.equal(first, second), "a function of the step"
    assert not torch.equal(run.rest().sparsifier.growth_scores()[0], first)
    assert one_layer("rigl").sparsifier.growth_scores() is None, "no gradient seen yet"
    snfs = one_layer("snfs", growth_momentum=0.75)
    step(snfs, torch.full((2, 6), -4.0))
    assert snfs.sparsifier.growth_scores()[0].tolist() == [[1.0] * 6] * 2


@pytest.mark.parametrize(("gradient_weight", "smallest"), [(0.0, 0), (1.0, 1)])
def test_mest_drops_by_magnitude_and_gradient(gradient_weight, smallest):
    # |W| + lambda |dL/dW| of four weights: 1 + 10 lambda, 2, 3 and 4
    run = one_layer("mest", gradient_weight=gradient_weight, moved=0.25)
    old, weight = run.mask, run.model[0].weight
    places = [tuple(place) for place in old.nonzero()]
    with torch.no_grad():
        weight[old] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    gradient = torch.zeros(2, 6)
    gradient[places[0]] = 10.0
    for _ in range(5):
        step(run, gradient)
    # one goes and one comes, at random
    assert [index for index, place in enumerate(places) if not run.mask[place]] == [smallest]
    assert int(run.mask.sum()) == 4


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("case", ["set", "rigl", "snfs", "mest", "mest-soft", "granet", "acdc"])
def test_revived_weights_start_fresh(case, adam):
    run = Run(case, total_steps=60, adam=adam)
    revived = 0
    for _ in range(60):
        before = masks(run)
        run.train(1)
        for weight, old, new in zip(weights(run), before, masks(run), strict=True):
            back = new & ~old
            revived += int(back.sum())
            assert not weight[back].any()
            for value in run.optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert not value[~new].any()
                    assert not value[back].any()
    assert revived > 0


def test_masked_gradients_leave_no_trace_in_the_optimizer():
    run = Run("static", total_steps=20, adam=True).train(5)
    for weight, mask in zip(weights(run), masks(run), strict=True):
        assert run.optimizer.state[weight]["exp_avg"][mask].any()
        assert not run.optimizer.state[weight]["exp_avg"][~mask].any()


def test_mest_bounds_and_stages():
    hard, soft = Run("mest", total_steps=160, update_every=5), Run("mest-soft", total_steps=160, update_every=5)
    target = sum(live(hard))
    seen = [sum(live(soft))]
    for _ in range(32):
        hard.train(5)
        soft.train(5)
        assert sum(live(hard)) == target
        seen.append(sum(live(soft)))
    # beyond the target by half, by a quarter from 90/160 on, and not at all from 120/160 on
    assert [round(count / target, 1) for count in seen] == [1.5] * 18 + [1.2] * 6 + [1.0] * 9


def test_acdc_alternates_as_the_paper_does():
    run = Run("acdc", total_steps=100, phase=sparse.ACDC.phase)
    dense = [float(run.sparsifier.sparsity() == 0.0)]
    for _ in range(100):
        run.train(1)
        dense.append(float(run.sparsifier.sparsity() == 0.0))
    phases = [1.0] * 10 + ([0.0] * 5 + [1.0] * 5) * 7 + [0.0] * 21
    assert dense == phases


def test_random_growth_is_the_same_on_every_rank_and_changes_with_the_seed():
    a, b, c = (masks(Run("set", total_steps=40, seed=seed).train(20)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_step_that_the_scaler_skips_changes_no_mask():
    run = Run("rigl", total_steps=100, update_every=1)
    scaler = torch.amp.GradScaler("cpu")
    before = masks(run)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        images, labels = run.batch(0)
        run.optimizer.zero_grad()
        scaler.scale(F.cross_entropy(run.model(images), labels) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        assert run.sparsifier.steps == int(moves)
        assert all(torch.equal(a, b) for a, b in zip(before, masks(run), strict=True)) != moves


def test_attaching_again_replaces_and_finalize_lets_go():
    run = Run("static", total_steps=20)
    run.sparsifier.attach(run.optimizer)
    assert len(run.optimizer._optimizer_step_post_hooks) == 1
    run.train(20)
    run.sparsifier.finalize()
    assert not run.optimizer._optimizer_step_post_hooks
    assert not run.optimizer._optimizer_step_pre_hooks


def test_finalize_before_the_end_cuts_to_the_target():
    run = Run("gmp", total_steps=100).train(10)
    with pytest.warns(UserWarning, match="after 10 of 100 steps"):
        model = run.sparsifier.finalize()
    zeros = [(m.weight == 0).float().mean() for m in model.modules() if isinstance(m, nn.Linear)]
    assert zeros[0] > 0.5


def test_blocks_of_four_live_and_die_together():
    for method in ("gmp", "rigl"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 4))
        sparsifier = sparse.create(method, model, target=0.8, total_steps=20, block=4, update_every=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        sparsifier.attach(optimizer)
        for index in range(20):
            optimizer.zero_grad()
            x = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(index))
            F.cross_entropy(model(x), x[:, 0, 0, :4].argmax(1)).backward()
            optimizer.step()
        conv, fc = sparsifier.live_masks().values()
        assert set(conv.sum(1).flatten().tolist()) <= {0, 4}
        assert set(fc.view(4, 72, 4).sum(2).flatten().tolist()) <= {0, 4}
        sparsifier.finalize()
        assert sparsifier.sparsity() == pytest.approx(0.8, abs=0.003)
        assert int(conv.sum() + fc.sum()) == math.floor(0.2 * (288 + 1152) / 4) * 4


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gmp", {"start": 0.5, "end": 0.5}, "0 <= start < end <= 1, got 0.5 and 0.5"),
        (
            "gmp",
            {"update_every": 0},
            "update_every must be a whole number of steps between 1 and total_steps=100, got 0",
        ),
        ("set", {"drop_fraction": 0.0}, r"drop_fraction must be in \(0, 1\), got 0"),
        ("set", {"update_every": 80}, "update_every=80 leaves no update within 75% of total_steps=100"),
        ("rigl", {"stop": 2.0}, r"stop must be in \(0, 1\], got 2"),
        ("snfs", {"growth_momentum": 1.0}, r"growth_momentum must be in \[0, 1\), got 1"),
        ("mest", {"moved": 1.0}, r"moved must be in \(0, 1\), got 1"),
        ("mest", {"gradient_weight": -1.0}, "gradient_weight must be a finite number that is not negative"),
        ("granet", {"initial_density": 0.05}, "initial_density=0.05 must be above the target's density, 0.1"),
        ("acdc", {"final": 0.05}, "0 <= warmup < final < 1 must hold"),
        (
            "acdc",
            {"phase": 0.001},
            "phase must be a share of the run and last a step at least, got 0.001 of 100 steps: train 1000 or more",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_changed(method, options, message):
    model = nn.Sequential(nn.Linear(20, 10))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        sparse.create(method, model, target=0.9, total_steps=100, **options)
    assert torch.equal(model[0].weight, before)


def test_training_flops_of_a_rigl_layer_are_the_papers():
    # a step costs 3 f_S, and every update a dense weight gradient more: RigL, appendix on FLOPs
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    sparsifier = sparse.create("rigl", model, target=0.9, total_steps=32000, update_every=100)
    (layer,) = sparsifier.layers()
    counted = cost.count(model, torch.zeros(1, 100))
    log = [cost.TrainingSteps(1, {"0": layer.density}, {"0": layer.weight_grad_density})]
    assert cost.training_ratio(counted, log) == pytest.approx((3 * 0.1 + 0.9 / 100) / 3)


def test_static_sparse_training_learns():
    run = Run("static", total_steps=200, target=0.5).train(200)
    images, labels = batch(10_000, 500)
    run.plain.eval()
    assert (run.plain(images).argmax(1) == labels).float().mean() > 0.8


def sparse_layers():
    """Two layers of 40 weights, 30 and 24 of them 0."""
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 8, bias=False))
    with torch.no_grad():
        for module, zeros in zip(model, (30, 24), strict=True):
            module.weight.flatten()[torch.randperm(40)[:zeros]] = 0.0
    return model


def descend(model, sparsifier, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).sub(1.0).square().mean().backward()
        optimizer.step()
        yield [layer.density for layer in sparsifier.layers()]


def test_static_holds_the_zeros_that_the_model_has():
    model = sparse_layers()
    zeros = [module.weight == 0 for module in model]
    before = [module.weight.clone() for module in model]
    sparsifier = sparse.create("static", model, masks="nonzero", total_steps=20)
    assert sparsifier.sparsity() == pytest.approx(54 / 80)
    for densities in descend(model, sparsifier, 20):
        assert densities == pytest.approx([10 / 40, 16 / 40])
    sparsifier.finalize()
    for module, zero, old in zip(model, zeros, before, strict=True):
        assert torch.equal(module.weight == 0, zero)
        assert (module.weight[~zero] != old[~zero]).any()


def test_static_takes_the_largest_over_all_layers_or_of_each():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -7.0, 6.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[-5.0, 2.0, 3.0, 4.0]]))
    for distribution, expected in (
        ("global", [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ("uniform", [[1, 1, 0, 0], [1, 0, 0, 1]]),
    ):
        options = {"masks": "magnitude", "distribution": distribution, "target": 0.5, "total_steps": 10}
        masks = sparse.create("static", model, **options).live_masks().values()
        assert [mask[0].int().tolist() for mask in masks] == expected


def test_gmp_goes_on_from_a_sparse_model():
    model = sparse_layers()
    zeros = [module.weight == 0 for module in model]
    sparsifier = sparse.create("gmp", model, target=0.9, total_steps=100, update_every=10)
    # s(t) = s_f + (s_i - s_f) (1 - u)^3
    s_i = 54 / 80
    for step, densities in enumerate(descend(model, sparsifier, 100), 1):
        expected = 1 - (0.9 + (s_i - 0.9) * (1 - cubic_ramp(step // 10 / 10, 0.05, 0.6)))
        assert 40 * sum(densities) == pytest.approx(math.floor(80 * expected + 1e-6)), step
        assert all(not module.weight[zero].any() for module, zero in zip(model, zeros, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "nonzero", "target": 0.9}, "holds the zeros that the model has: leave target"),
        ({"masks": "nonzero", "distribution": "erk"}, "holds the zeros that the model has: leave distribution"),
        ({"masks": "nonzero", "block": 4}, "holds the zeros that the model has: leave block"),
        ({"masks": "nonzero", "floor": 0.1}, "holds the zeros that the model has: leave floor"),
        ({"masks": "nonzero", "seed": 1}, "masks='nonzero' draws nothing: leave seed out"),
        ({"masks": "magnitude", "seed": 1, "target": 0.5}, "masks='magnitude' draws nothing: leave seed out"),
        ({"masks": "zeros", "target": 0.5}, "masks must be one of random, magnitude, nonzero, got 'zeros'"),
        ({"masks": "random", "target": 0.5, "distribution": "global"}, "distribution='global'.*pass masks='magnitude'"),
    ],
)
def test_options_that_static_has_no_use_for_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse.create("static", sparse_layers(), total_steps=100, **options)


def test_a_dense_model_has_no_zeros_to_hold():
    with pytest.raises(ValueError, match="of its 80 weights 0 are 0: load the sparse weights before"):
        sparse.create("static", nn.Sequential(nn.Linear(8, 10)), masks="nonzero", total_steps=100)
