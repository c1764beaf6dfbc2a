"""What a training state must survive, for every method: one matrix."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from tests.apart import apart
from tests.sparse.methods import CASES, EVERY, FAMILIES, SOFT, Run, assert_equal, batch, create, network

HALF, ALL = 6, 12

#: Steps of the runs over two processes.
TOGETHER = 10

#: Cases that grow weights, which are 0 until their next step; a layer's share of a FLOPs budget may rise by one.
GROWING = {"set", "set-block", "rigl", "snfs", "mest", "mest-soft", "granet", "acdc", "gmp-flops", "gmp-ms"}

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@pytest.fixture(params=EVERY)
def case(request):
    return request.param


def anatomy(model):
    """What is in a model besides the values of its parameters and buffers."""
    hooks = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"}
    return [
        (type(module), list(vars(module)), list(module._parameters), list(module._buffers))
        for module in model.modules()
    ], [
        [*(vars(module)[name] for module in model.modules() for name in hooks)],
        [(name, id(parameter), parameter._backward_hooks) for name, parameter in model.named_parameters()],
        {key: value.shape for key, value in model.state_dict().items()},
    ]


def test_the_model_stays_plain(case):
    plain = network()
    before, values = anatomy(plain), copy.deepcopy(plain.state_dict())
    sparsifier = create(case, plain, ALL)
    sparsifier.layers()
    assert_equal(plain.state_dict(), values, "making one and asking it changes nothing:")
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    sparsifier.attach(optimizer)
    for step in range(3):
        assert anatomy(plain) == before
        images, labels = batch(step)
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cut
        assert anatomy(sparsifier.finalize()) == before


def test_between_steps_the_parameters_are_the_weights_used(case):
    run = Run(case, total_steps=ALL)
    for step in range(ALL):
        run.train(1)
        for layer, (name, mask) in zip(run.sparsifier.layers(), run.sparsifier.live_masks().items(), strict=True):
            live = run.plain.get_submodule(name).weight != 0
            assert layer.live == mask.sum(), name
            if case in SOFT and step < ALL - 1:
                assert live[mask].all(), "what is live is used; what is not, fades until the last step"
            elif case in GROWING:
                assert mask[live].all(), (step, name)
            else:
                assert torch.equal(live, mask), (step, name)
    budget = run.sparsifier.budget
    if budget is not None:
        assert budget.density([layer.live for layer in run.sparsifier.layers()]) <= budget.goal * (1 + 1e-9)


def test_finalize_leaves_exact_zeros_and_what_the_model_computed(case):
    run = Run(case, total_steps=ALL).train(ALL)
    images, _ = batch(0)
    run.plain.eval()
    before, masks = run.plain(images), {k: mask.clone() for k, mask in run.sparsifier.live_masks().items()}
    model = run.sparsifier.finalize()
    assert model is run.plain
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), name
    weights, live = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    assert run.sparsifier.sparsity() == pytest.approx(1 - live / weights)
    if run.sparsifier.budget is not None and run.sparsifier.budget.kind == "sparsity":
        assert live == int(run.sparsifier.budget.goal * weights + 1e-6)
    optimizer = run.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "step" not in vars(optimizer)
    with pytest.raises(ValueError, match="plain .*already finalized"):
        run.sparsifier.finalize()
    with pytest.raises(RuntimeError, match="attach\\(\\) after finalize\\(\\)"):
        run.sparsifier.attach(run.optimizer)
    with pytest.raises(RuntimeError, match="state_dict\\(\\) after finalize\\(\\)"):
        run.sparsifier.state_dict()


#: The model's state, before the sparsifier is made or later; the sparsifier's, before it is attached or later.
ORDERS = [
    order.split()
    for order in (
        "model make sparsifier attach",
        "model make attach sparsifier",
        "make model sparsifier attach",
        "make model attach sparsifier",
        "make sparsifier model attach",
        "make sparsifier attach model",
        "make attach model sparsifier",
        "make attach sparsifier model",
    )
]


def load_all(case, state, order, adam):
    """A run that goes on from a checkpoint, what there is made and loaded in this order."""
    torch.manual_seed(2)
    run = Run.__new__(Run)
    run.device, run.plain = "cpu", network()
    run.model = run.plain
    parameters = run.plain.parameters()
    run.optimizer = torch.optim.AdamW(parameters, lr=3e-3) if adam else torch.optim.SGD(parameters, **SGD)
    for what in order:
        if what == "model":
            run.plain.load_state_dict(state["model"])
        elif what == "make":
            run.sparsifier = create(case, run.plain, ALL)
        elif what == "attach":
            run.sparsifier.attach(run.optimizer)
        else:
            run.sparsifier.load_state_dict(state["sparsifier"])
    run.optimizer.load_state_dict(state["optimizer"])
    return run


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_resume_is_bit_equal_to_an_uninterrupted_run_in_any_order(case, adam):
    straight = Run(case, total_steps=ALL, adam=adam).train(HALF)
    buffer = io.BytesIO()
    torch.save(straight.state(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    straight.train(1)
    soon = copy.deepcopy(straight.plain.state_dict())
    straight.train(ALL - HALF - 1)
    runs = [load_all(case, copy.deepcopy(saved), order, adam) for order in ORDERS]
    for order, run in zip(ORDERS, runs, strict=True):
        assert_equal(run.sparsifier.state_dict(), saved["sparsifier"], " ".join(order))
        assert_equal(run.train(1).plain.state_dict(), soon, " ".join(order))
    resumed = runs[list(CASES).index(case) % len(ORDERS)].train(ALL - HALF - 1)
    assert_equal(resumed.state(), straight.state())
    assert resumed.sparsifier.layers() == straight.sparsifier.layers()
    assert_equal(resumed.sparsifier.finalize().state_dict(), straight.sparsifier.finalize().state_dict())


def test_copies_go_their_own_ways(case):
    run, straight = Run(case, total_steps=ALL).train(HALF), Run(case, total_steps=ALL).train(HALF + 5)
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        twin = duplicate(run.plain)
        assert_equal(twin.state_dict(), run.plain.state_dict())
    before = copy.deepcopy(twin.state_dict())
    images, labels = batch(0)
    run.train(2)
    assert_equal(twin.state_dict(), before)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    F.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    assert_equal(run.train(3).plain.state_dict(), straight.plain.state_dict())


def test_a_model_that_holds_its_sparsifier_is_copied_with_it(case):
    # as a trainer's module does, whose average a callback makes by a deepcopy
    run = Run(case, total_steps=ALL).train(HALF)
    run.plain.sparsifier = run.sparsifier
    twins = [copy.deepcopy(run.plain), pickle.loads(pickle.dumps(run.plain))]
    state, optimizer_state = run.sparsifier.state_dict(), copy.deepcopy(run.optimizer.state_dict())
    run.train(3)
    for twin in twins:
        assert twin.sparsifier.model is twin
        assert_equal(twin.sparsifier.state_dict(), state)
        optimizer = torch.optim.SGD(twin.parameters(), **SGD)
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        twin.sparsifier.attach(optimizer)
        for step in range(HALF, HALF + 3):
            images, labels = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(twin(images), labels).backward()
            optimizer.step()
        assert_equal(twin.state_dict(), run.plain.state_dict())


def test_an_average_of_the_weights_is_cut_to_the_final_mask(case):
    run = Run(case, total_steps=ALL)
    average = torch.optim.swa_utils.AveragedModel(
        run.plain, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(ALL):
        run.train(1)
        average.update_parameters(run.plain)
    later, state = copy.deepcopy(average.module), run.sparsifier.state_dict()
    with pytest.raises(ValueError, match="give what it wraps, its .module"):
        run.sparsifier.finalize(average)
    averaged = run.sparsifier.finalize(average.module)
    assert_equal(run.sparsifier.state_dict(), state)
    original = run.sparsifier.finalize()
    assert_equal(run.sparsifier.finalize(later).state_dict(), averaged.state_dict())
    for layer in run.sparsifier.layers():
        zeros = [model.get_submodule(layer.name).weight == 0 for model in (averaged, original)]
        assert torch.equal(*zeros), layer.name


@pytest.mark.parametrize("case", FAMILIES)
def test_one_graph_under_compile_and_no_recompilation(case):
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    run = Run(case, total_steps=ALL, wrap=lambda m: torch.compile(m, backend=counter, fullgraph=True)).train(ALL)
    assert counter.frame_count == 1
    assert_equal(run.plain.state_dict(), Run(case, total_steps=ALL).train(ALL).plain.state_dict())


@pytest.mark.parametrize("case", FAMILIES)
def test_function_transforms_and_second_derivatives(case):
    run = Run(case, total_steps=ALL, norm=False).train(3)
    images, labels = batch(0, 4)
    parameters = {name: p.detach() for name, p in run.plain.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(run.plain, values, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    run.optimizer.zero_grad()
    whole = F.cross_entropy(run.plain(images), labels)
    grads = torch.autograd.grad(whole, list(run.plain.parameters()), create_graph=True)
    for grad, per_image in zip(grads, each.values(), strict=True):
        torch.testing.assert_close(per_image.mean(0), grad, rtol=1e-3, atol=1e-5)
    sum((grad**2).sum() for grad in grads).backward()
    assert all(parameter.grad is not None for parameter in run.plain.parameters())
    straight = Run(case, total_steps=ALL, norm=False).train(6)
    assert_equal(run.train(3).plain.state_dict(), straight.plain.state_dict())


def test_clipping_sees_the_gradient_of_the_weights_used(case):
    run, plain = Run(case, total_steps=ALL), network()
    for step in range(HALF):
        images, labels = batch(step)
        plain.load_state_dict(run.plain.state_dict())
        plain.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(images), labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.plain.parameters(), 0.5)
        assert norm == torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        run.optimizer.step()
    assert run.sparsifier.steps == HALF
    assert all(parameter.isfinite().all() for parameter in run.plain.parameters())


def test_weights_loaded_in_the_middle_are_gone_on_from(case):
    steps = 30  # for the loss to fall
    run = Run(case, total_steps=steps).train(3)
    torch.manual_seed(5)
    other = network()
    run.plain.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="weights were changed outside the optimizer's step"):
        run.train(1)
    masks = run.sparsifier.live_masks()
    for layer in run.sparsifier.layers():
        weight = run.plain.get_submodule(layer.name).weight
        assert case in SOFT or not weight[~masks[layer.name]].any()
    run.train(steps - 4)
    images, labels = batch(10_000, 200)
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), labels) for model in (run.plain.eval(), other.eval())]
    assert losses[0] < losses[1]
    if run.sparsifier.budget is not None:
        live = [layer.live for layer in run.sparsifier.layers()]
        assert run.sparsifier.budget.density(live) <= run.sparsifier.budget.goal * (1 + 1e-9)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(*each.values, torch.float16, marks=each.marks) for each in EVERY),
        *((case, torch.bfloat16) for case in FAMILIES),
    ],
)
def test_autocast(case, dtype):
    run = Run(case, total_steps=ALL)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    while run.sparsifier.steps < ALL:  # steps that the scaler skips did not happen
        images, labels = batch(run.sparsifier.steps)
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            output = run.model(images)
        assert output.dtype == dtype
        scaler.scale(F.cross_entropy(output.float(), labels)).backward()
        scaler.step(run.optimizer)
        scaler.update()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in run.plain.parameters())
    assert all(torch.isfinite(p).all() for p in run.plain.parameters())
    if run.sparsifier.budget is not None and run.sparsifier.budget.kind == "sparsity":
        assert run.sparsifier.sparsity() == pytest.approx(1 - run.sparsifier.budget.goal, abs=2e-3)


@pytest.mark.parametrize(("kind", "fused"), [(torch.optim.SGD, False), (torch.optim.AdamW, True)])
def test_scaled_gradients_and_steps_that_overflow_change_nothing(case, kind, fused):
    # Powers of two scale exactly, so what a scaler does must not show in a single bit.
    runs = []
    for scaled in (False, True):
        run = Run(case, total_steps=ALL, norm=False)
        run.sparsifier.attach(optimizer := kind(run.plain.parameters(), lr=1e-2, fused=fused))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**16)
        for step in range(8):
            images, labels = batch(step)
            for overflows in (True, False) if scaled and step in (0, 2, 5) else (False,):
                optimizer.zero_grad()
                loss = F.cross_entropy(run.plain(images), labels) * (math.inf if overflows else 1.0)
                scaler.scale(loss).backward()
                if step == 3:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        assert run.sparsifier.steps == 8
        runs.append(run)
    assert_equal(runs[1].plain.state_dict(), runs[0].plain.state_dict())
    assert_equal(runs[1].sparsifier.state_dict(), runs[0].sparsifier.state_dict())


def test_accumulated_gradients_equal_those_of_the_whole_batch(case):
    whole, parts = Run(case, norm=False), Run(case, norm=False)
    images, labels = batch(0)
    F.cross_entropy(whole.model(images), labels).backward()
    for x, y in zip(images.chunk(4), labels.chunk(4), strict=True):
        (F.cross_entropy(parts.model(x), y) / 4).backward()
    for (name, a), b in zip(whole.plain.named_parameters(), parts.plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    parts.optimizer.step()
    assert parts.sparsifier.steps == 1


@pytest.mark.parametrize("case", FAMILIES)
def test_export(case):
    run = Run(case, total_steps=ALL).train(HALF)
    images, _ = batch(0)
    run.plain.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, and of the cut
        exported = torch.export.export(run.plain, (images,)).module()
        torch.testing.assert_close(exported(images), run.plain(images))
        plain = run.sparsifier.finalize()
        program = torch.export.export(plain, (images,))
    torch.testing.assert_close(program.module()(images), plain(images))


def _replicas():
    states, rank = {}, torch.distributed.get_rank()
    for case in CASES:
        run = Run(case, total_steps=TOGETHER, wrap=nn.parallel.DistributedDataParallel)
        for step in range(TOGETHER):
            images, labels = batch(2 * step + rank)
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(images), labels).backward()
            run.optimizer.step()
        states[case] = (run.sparsifier.steps, run.sparsifier.state_dict(), run.sparsifier.finalize().state_dict())
    return states


@pytest.mark.slow
def test_two_processes_keep_identical_masks(tmp_path):
    first, second = apart(_replicas, tmp_path, count=2)
    for case in CASES:
        assert first[case][0] == TOGETHER
        assert_equal(first[case][1], second[case][1], case)
        # Statistics of batches are each process's own.
        finals = [{key: v for key, v in final[case][2].items() if "running" not in key} for final in (first, second)]
        assert_equal(*finals, case)
