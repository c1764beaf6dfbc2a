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

from tests.sparse.methods import CASES, Run, batch

HALF, ALL = 15, 30


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_keys_while_training_hold_the_dense_ones(case):
    run = Run(case)
    state = run.plain.state_dict()
    assert {key: state[key].shape for key in run.dense_keys} == run.dense_keys


def test_finalize_leaves_a_plain_model(case):
    run = Run(case, total_steps=ALL).train(ALL)
    images, _ = batch(0)
    run.plain.eval()
    before, sparsity = run.plain(images), run.sparsifier.sparsity()
    names = [layer.name for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    assert model is run.plain
    assert {key: value.shape for key, value in model.state_dict().items()} == run.dense_keys
    for module in model.modules():
        assert not type(module).__module__.startswith("rarefy")
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        leftovers = {"raw_threshold", "alpha", "lower", "threshold_function", "reparam"}
        assert not leftovers & (set(vars(module)) | set(module._parameters) | set(module._buffers))
    assert {id(p) for p in model.parameters()} <= {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    weights = [model.get_submodule(name).weight for name in names]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(sparsity, abs=2e-3)
    with pytest.raises(ValueError, match="plain .*already finalized"):
        run.sparsifier.finalize()
    with pytest.raises(RuntimeError, match="step\\(\\) after finalize\\(\\)"):
        run.sparsifier.step()


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_resume_is_bit_equal_to_an_uninterrupted_run(case, adam):
    straight = Run(case, total_steps=ALL, adam=adam).train(ALL)
    buffer = io.BytesIO()
    torch.save(Run(case, total_steps=ALL, adam=adam).train(HALF).state(), buffer)
    buffer.seek(0)
    resumed = Run(case, total_steps=ALL, adam=adam).load(torch.load(buffer, weights_only=True)).train(ALL - HALF)
    assert_equal(resumed.plain.state_dict(), straight.plain.state_dict())
    assert resumed.sparsifier.layers() == straight.sparsifier.layers()
    assert_equal(resumed.sparsifier.finalize().state_dict(), straight.sparsifier.finalize().state_dict())


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


def test_an_average_of_the_weights_can_be_finalized(case):
    run = Run(case, total_steps=ALL)
    average = torch.optim.swa_utils.AveragedModel(
        run.plain, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(ALL):
        run.train(1)
        average.update_parameters(run.plain)
    averaged = run.sparsifier.finalize(average.module)
    assert {key: value.shape for key, value in averaged.state_dict().items()} == run.dense_keys
    original = run.sparsifier.finalize()
    if run.sparsifier.budget is not None and run.sparsifier.budget.kind == "sparsity":
        counts = [sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1) for model in (averaged, original)]
        assert counts[0] == counts[1]


def test_one_graph_under_compile_and_no_recompilation(case):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    eager = Run(case, total_steps=ALL).train(ALL)
    compiled = Run(case, total_steps=ALL, wrap=lambda m: torch.compile(m, backend=counter, fullgraph=True)).train(ALL)
    assert counter.frame_count == 1
    for key, value in compiled.plain.state_dict().items():
        torch.testing.assert_close(value, eager.plain.state_dict()[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_thresholds_in_float32(case, dtype):
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
        run.sparsifier.step()
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
    assert not [node for node in program.graph.nodes if "rarefy" in str(node.target)]
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
            run.sparsifier.step()
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
