"""What a training state must survive, for every method: one matrix."""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from tests.sparse.methods import CASES, Run, batch, create, network

HALF, ALL = 15, 30


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


#: Methods whose masks are soft until the last step: what is masked is small then, and 0 from there on.
SOFT = ("ltp", "cs")


def test_the_model_stays_plain_while_training(case):
    plain = network()
    run = Run(case, total_steps=ALL)
    for _ in range(3):
        run.train(1)
        assert {k: v.shape for k, v in run.plain.state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
        for module, other in zip(run.plain.modules(), plain.modules(), strict=True):
            assert type(module) is type(other)
            assert vars(module).keys() == vars(other).keys()
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks
        assert not any(parameter._backward_hooks for parameter in run.plain.parameters())


def test_between_steps_the_parameters_are_the_weights_used(case):
    run = Run(case, total_steps=ALL)
    for step in range(ALL):
        run.train(1)
        for name, mask in run.sparsifier.live_masks().items():
            weight = run.plain.get_submodule(name).weight
            if case not in SOFT or step == ALL - 1:
                assert not weight[~mask].any(), (step, name)
    goal = run.sparsifier.budget
    if goal is not None:
        live = [layer.live for layer in run.sparsifier.layers()]
        assert goal.density(live) <= goal.goal * (1 + 1e-9)


def test_finalize_leaves_exact_zeros_and_what_the_model_computed(case):
    run = Run(case, total_steps=ALL).train(ALL)
    images, _ = batch(0)
    run.plain.eval()
    before, sparsity = run.plain(images), run.sparsifier.sparsity()
    names = [layer.name for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    assert model is run.plain
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    weights = [model.get_submodule(name).weight for name in names]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(sparsity, abs=2e-3)
    assert run.sparsifier.sparsity() == zeros
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="plain .*already finalized"):
        run.sparsifier.finalize()
    with pytest.raises(RuntimeError, match="attach\\(\\) after finalize\\(\\)"):
        run.sparsifier.attach(run.optimizer)


def load_all(case, state, order, **options):
    """A run that goes on from a checkpoint, what there is made and loaded in this order."""
    torch.manual_seed(2)
    run = Run.__new__(Run)
    run.device, run.plain = "cpu", network()
    run.model = run.plain
    for what in order.split():
        if what == "model":
            run.plain.load_state_dict(state["model"])
        elif what == "make":
            run.sparsifier = create(case, run.plain, ALL)
        elif what == "attach":
            kinds = {True: (torch.optim.AdamW, {"lr": 3e-3}), False: (torch.optim.SGD, SGD)}
            kind, defaults = kinds[options["adam"]]
            run.optimizer = kind(run.plain.parameters(), **defaults)
            run.sparsifier.attach(run.optimizer)
            run.optimizer.load_state_dict(state["optimizer"])
        else:
            run.sparsifier.load_state_dict(state["sparsifier"])
    return run


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}

ORDERS = (
    "make attach model sparsifier",
    "model make attach sparsifier",
    "model make sparsifier attach",
    "make sparsifier model attach",
    "make attach sparsifier model",
)


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_resume_is_bit_equal_to_an_uninterrupted_run_in_any_order(case, adam):
    straight = Run(case, total_steps=ALL, adam=adam).train(ALL)
    buffer = io.BytesIO()
    torch.save(Run(case, total_steps=ALL, adam=adam).train(HALF).state(), buffer)
    layers = straight.sparsifier.layers()
    for order in ORDERS:
        buffer.seek(0)
        resumed = load_all(case, torch.load(buffer, weights_only=True), order, adam=adam).train(ALL - HALF)
        assert_equal(resumed.plain.state_dict(), straight.plain.state_dict())
        assert resumed.sparsifier.layers() == layers, order


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(case, duplicate):
    run = Run(case, total_steps=ALL).train(HALF)
    images, _ = batch(0)
    run.plain.eval()
    expected = run.plain(images)
    twin = duplicate(run.plain)
    assert torch.equal(twin(images), expected)
    run.train(ALL - HALF)
    assert torch.equal(twin.eval()(images), expected), "a copy must not follow the original"


def test_an_average_of_the_weights_is_cut_to_the_final_mask(case):
    run = Run(case, total_steps=ALL)
    average = torch.optim.swa_utils.AveragedModel(
        run.plain, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(ALL):
        run.train(1)
        average.update_parameters(run.plain)
    averaged = run.sparsifier.finalize(average.module)
    original = run.sparsifier.finalize()
    names = [layer.name for layer in run.sparsifier.layers()]
    for name in names:
        zeros = [model.get_submodule(name).weight == 0 for model in (averaged, original)]
        assert torch.equal(*zeros), name


def test_one_graph_under_compile_and_no_recompilation(case):
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    run = Run(case, total_steps=ALL, wrap=lambda m: torch.compile(m, backend=counter, fullgraph=True)).train(ALL)
    assert counter.frame_count == 1
    eager = Run(case, total_steps=ALL).train(ALL)
    for key, value in run.plain.state_dict().items():
        torch.testing.assert_close(value, eager.plain.state_dict()[key], rtol=1e-3, atol=1e-4)


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


def test_clipping_sees_the_gradient_of_the_weights_used(case):
    run = Run(case, total_steps=ALL)
    for step in range(ALL):
        images, labels = batch(step)
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(images), labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.plain.parameters(), 0.5)
        assert norm.isfinite()
        run.optimizer.step()
    assert run.sparsifier.steps == ALL
    assert all(parameter.isfinite().all() for parameter in run.plain.parameters())


@pytest.mark.filterwarnings("ignore:weights were changed outside")
def test_weights_loaded_in_the_middle_are_gone_on_from(case):
    run = Run(case, total_steps=ALL).train(3)
    torch.manual_seed(5)
    other = network()
    run.plain.load_state_dict(other.state_dict())
    run.train(ALL - 3)
    assert run.sparsifier.steps == ALL
    images, labels = batch(10_000, 200)
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), labels) for model in (run.plain.eval(), other.eval())]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    run = Run(case, total_steps=ALL)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    for step in range(ALL):
        images, labels = batch(step)
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


def test_accumulated_gradients_equal_those_of_the_whole_batch(case):
    whole, parts = Run(case, norm=False), Run(case, norm=False)
    images, labels = batch(0)
    F.cross_entropy(whole.model(images), labels).backward()
    for x, y in zip(images.chunk(4), labels.chunk(4), strict=True):
        (F.cross_entropy(parts.model(x), y) / 4).backward()
    for (name, a), b in zip(whole.plain.named_parameters(), parts.plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_export(case):
    run = Run(case, total_steps=ALL).train(HALF)
    images, _ = batch(0)
    run.plain.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        exported = torch.export.export(run.plain, (images,)).module()
        torch.testing.assert_close(exported(images), run.plain(images))
        plain = run.sparsifier.finalize()
        program = torch.export.export(plain, (images,))
    torch.testing.assert_close(program.module()(images), plain(images))


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    states = {}
    for case in CASES:
        run = Run(case, total_steps=ALL, wrap=nn.parallel.DistributedDataParallel)
        for step in range(ALL):
            images, labels = batch(2 * step + rank)
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(images), labels).backward()
            run.optimizer.step()
        masks = dict(run.sparsifier.finalize().named_parameters())
        states[case] = (run.sparsifier.steps, masks)
    torch.save(states, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # the end of the interpreter may abort (pytorch/pytorch#190489)


def test_two_processes_keep_identical_masks(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for case in CASES:
        assert_equal(first[case][1], second[case][1])
