"""What a GPU must do as the CPU does: ``make test-gpu`` runs this file where there is one."""

import functools
import io
import json
import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic algorithms ask for, before CUDA starts

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn

from rarefy import act, cost, kernels
from rarefy._prices import Prices
from rarefy.act import gradients
from rarefy.act.kernels import aten, gpu, launch
from rarefy.act.spec import reference
from rarefy.data import fashion_mnist
from rarefy.kernels import _thresholds_pytorch, thresholds
from rarefy.sparse import create, masks
from rarefy.train import Classification
from tests.kernels.threshold_cases import KINDS, Case
from tests.sparse.methods import CASES, STEPS, TARGETED, Run, accuracy, network
from tests.train.runs import recipe, records, stop_at, synthetic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF, ALL = 15, 30
SHAPES = {key: value.shape for key, value in network().state_dict().items()}
ACTIVATIONS = {
    "tanh": act.tanh,
    "sigmoid": act.sigmoid,
    "silu": act.silu,
    "gelu": act.gelu,
    "gelu_tanh": functools.partial(act.gelu, approximate="tanh"),
    "quick_gelu": act.quick_gelu,
    "mish": act.mish,
    "softplus": act.softplus,
    "hardswish": act.hardswish,
    "elu": act.elu,
    "exp": act.exp,
}
MODES = [(function, mode) for function in ACTIVATIONS for mode in reference.modes(function)]
GATED = {"silu": act.silu_and_mul, "gelu": act.gelu_and_mul, "gelu_tanh": act.gelu_tanh_and_mul}
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SMALL = [dtype for dtype, fmt in aten.FORMAT_OF.items() if fmt.bits <= 16]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def deterministic():
    """PyTorch's deterministic algorithms, which refuse an operation that has none."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def finish(run, norm=True):
    """Finalize, and check that the zeros are exact and where the budget has them."""
    goal = run.sparsifier.budget
    names = [layer.name for layer in run.sparsifier.layers()]
    model = run.sparsifier.finalize()
    assert not norm or {key: value.shape for key, value in model.state_dict().items()} == SHAPES
    assert all(value.is_cuda and value.isfinite().all() for value in model.state_dict().values())
    live = [int((model.get_submodule(name).weight != 0).sum()) for name in names]
    if goal is not None:
        assert goal.density(live) <= goal.goal * (1 + 1e-9)
        assert goal.density(live) == pytest.approx(goal.goal, rel=0.02)
    return model


@pytest.mark.parametrize("case", TARGETED)
def test_training_reaches_the_target(case):
    run = Run(case, device="cuda").train(STEPS)
    assert accuracy(finish(run).cpu()) > 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype):
    run = Run(case, total_steps=ALL, device="cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    while run.sparsifier.steps < ALL:  # steps that the scaler skips did not happen
        images, labels = run.batch(run.sparsifier.steps)
        run.optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            output = run.model(images)
        assert output.dtype == dtype
        scaler.scale(F.cross_entropy(output.float(), labels)).backward()
        scaler.step(run.optimizer)
        scaler.update()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in run.plain.parameters())
    finish(run)


def test_resume_is_bit_equal_to_an_uninterrupted_run(case, deterministic):
    straight = Run(case, total_steps=ALL, device="cuda").train(ALL)
    buffer = io.BytesIO()
    torch.save(Run(case, total_steps=ALL, device="cuda").train(HALF).state(), buffer)
    buffer.seek(0)
    # On the CPU first, as the checkpoints of rarefy.train are read.
    state = torch.load(buffer, weights_only=True, map_location="cpu")
    resumed = Run(case, total_steps=ALL, device="cuda").load(state).train(ALL - HALF)
    assert resumed.sparsifier.layers() == straight.sparsifier.layers()
    ends = [run.sparsifier.finalize().state_dict() for run in (resumed, straight)]
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def test_the_first_steps_are_those_of_the_cpu(case):
    runs = [Run(case, total_steps=STEPS, device=device).train(3) for device in ("cpu", "cuda")]
    for (name, here), there in zip(runs[0].plain.named_parameters(), runs[1].plain.parameters(), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what Dynamo imports
def test_one_graph_under_compile(case):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = Run(case, total_steps=ALL, device="cuda", wrap=lambda m: torch.compile(m, backend=counter, fullgraph=True))
    finish(run.train(ALL))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("case", ["autosparse-accuracy", "rigl", "st3", "cs"])
def test_inductor(case):
    torch._dynamo.reset()
    eager = Run(case, total_steps=ALL, device="cuda").train(5)
    run = Run(case, total_steps=ALL, device="cuda", wrap=lambda m: torch.compile(m, fullgraph=True)).train(5)
    for a, b in zip(run.plain.parameters(), eager.plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    finish(run.train(ALL - 5))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(case):
    run = Run(case, total_steps=100_000, device="cuda").train(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.sparsifier.steps == 6


@pytest.mark.parametrize("case", ["autosparse-accuracy", "gmp", "rigl", "st3"])
def test_forward_and_backward_in_a_cuda_graph(case):
    eager, captured = (Run(case, norm=False, device="cuda") for _ in range(2))
    images, labels = (tensor.clone() for tensor in captured.batch(0))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.optimizer.zero_grad()
            F.cross_entropy(captured.model(images), labels).backward()
    torch.cuda.current_stream().wait_stream(side)
    captured.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(captured.model(images), labels).backward()
    for step in range(STEPS):
        for tensor, new in zip((images, labels), captured.batch(step), strict=True):
            tensor.copy_(new)
        for parameter in captured.plain.parameters():
            parameter.grad.zero_()
        graph.replay()
        captured.optimizer.step()
        if step < 5:
            eager.train(1)
            for a, b in zip(captured.plain.parameters(), eager.plain.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    eager.train(STEPS - 5)
    found, expected = (accuracy(finish(run, norm=False).cpu()) for run in (captured, eager))
    assert found > expected - 0.1


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_is_not_captured():
    run = Run("gmp", device="cuda").train(2)
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run.optimizer.step()


@pytest.mark.filterwarnings("ignore")  # of a prototype
def test_pytorch_takes_two_of_four():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier = create("nm", model, total_steps=20).attach(optimizer)
    x = torch.randn(64, 128, device="cuda")
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model = sparsifier.finalize().half()
    expected = model(x.half())
    for module in (model[0], model[2]):
        module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(module.weight), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x.half()), expected, rtol=1e-2, atol=1e-2)


def test_autosparse_moves_to_the_gpu_while_it_trains():
    run = Run("autosparse-accuracy", total_steps=ALL).train(HALF)
    run.plain.cuda()
    run.device = "cuda"
    for state in run.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].cuda()
    run.sparsifier.attach(run.optimizer)
    finish(run.train(ALL - HALF))


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_have_the_bits_of_the_cpu(kind):
    case = Case(kind)
    here = case.run()
    case.to("cuda")
    there = case.run()
    case.same(there, here)
    again = case.run()
    for name, tensors in there.items():  # sums too
        assert all(torch.equal(a, b) for a, b in zip(again[name], tensors, strict=True)), name
    with kernels.forced("pytorch"):
        case.same(case.run(), here)


def test_thresholds_run_in_triton():
    from rarefy.kernels import _thresholds_triton

    weight = torch.zeros(3, device="cuda")
    for dtype in _thresholds_triton.TYPES:
        assert thresholds._implementation(weight.device, dtype) is _thresholds_triton
    assert thresholds._implementation(weight.device, torch.float64) is _thresholds_pytorch
    numbers = (2**62 + 1, 0, 2**53 + 1, 1)
    assert _thresholds_triton._uploaded(numbers, weight.device, 0).tolist() == list(numbers)


def test_nan_passes_thresholds_and_masks_cut_it():
    given = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 0.1], device="cuda")
    layers = thresholds.ThresholdedLayers([given.clone()], [given.clone()], [1])
    half, one = torch.full((1,), 0.5, device="cuda"), torch.ones(1, device="cuda")
    layers.after(half, one)
    assert layers.weights[0][0].isnan()
    assert layers.weights[0][1:].tolist() == [float("inf"), -float("inf"), -1.5, 0]
    grad = torch.full_like(given, 3.0)
    assert layers.before([grad], half, one * 0).tolist() == [3]
    assert grad.tolist() == [3, 3, 3, 3, 0]
    thresholds.mask_([given], [torch.tensor([False, False, True, True, False], device="cuda")])
    assert given.tolist() == [0, 0, -float("inf"), -2, 0]


@pytest.fixture
def step():
    """The parts of a step over two layers: W, the gradient and what the step does with them."""
    case = Case(shapes=[(64, 300), (9, 41)], rows=True).to("cuda")
    layers = thresholds.ThresholdedLayers(case.copies(case.dense), case.copies(case.dense), case.rows)

    def run(grads):
        sums = layers.before(grads, case.thresholds, case.alpha, case.thresholds / 3)
        torch._foreach_add_(layers.weights, grads, alpha=-0.1)
        layers.after(case.thresholds, case.shrink)
        thresholds.mask_(layers.weights, case.masks)
        return sums, layers.count(case.thresholds)

    return case, layers, run


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_thresholds_never_wait_for_the_gpu(step):
    case, _, run = step
    run(case.copies(case.grads))
    torch.cuda.set_sync_debug_mode("error")
    try:
        held = [case.copies(case.grads) for _ in range(3)]  # each elsewhere
        for grads in held:
            run(grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_thresholds_in_a_graph(step):
    case, layers, run = step
    start = [case.copies(tensors) for tensors in (layers.weights, layers.latents)]
    expected = []
    for _ in range(3):
        expected.append([tensor.clone() for tensor in run(case.copies(case.grads))])
    ends = [case.copies(tensors) for tensors in (layers.weights, layers.latents)]
    for tensors, values in zip((layers.weights, layers.latents), start, strict=True):
        torch._foreach_copy_(tensors, values)
    grads, graph = case.copies(case.grads), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(grads)
    for values in expected:
        torch._foreach_copy_(grads, case.grads)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, values, strict=True))
    for tensors, values in zip((layers.weights, layers.latents), ends, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))


def test_thresholds_of_more_than_2_to_the_31_values():
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 7 * count:
        pytest.skip("needs 15 GB")
    weight, latent, grad = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    layers = thresholds.ThresholdedLayers([weight], [latent], [1])
    weight[-3:] = 2.0
    half, one = torch.full((1,), 0.5, device="cuda"), torch.ones(1, device="cuda")
    layers.after(half, one)
    assert (weight[-4:].tolist(), latent[-4:].tolist()) == ([0, 1.5, 1.5, 1.5], [0, 2, 2, 2])
    grad.fill_(1.0)
    assert layers.before([grad], half, one * 0).tolist() == [-3]
    assert (grad[-4:].tolist(), grad[:9].tolist()) == ([0, 1, 1, 1], [0] * 9)
    assert layers.count(half).tolist() == [3]


def test_the_choice_of_masks_is_that_of_the_cpu(deterministic):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(50, 30, generator=generator).round(decimals=1) for _ in range(3)]  # with ties
    prices = [Prices.one(1.0, 1500), Prices.one(49.0, 1500), Prices((100, 1000, 1500), (9.0, 3.5, 0.0))]
    for budget in (1000.0, 5000.5, 40000.0):
        here = masks.within_budget(scores, prices, budget, [1, 20, 1])
        there = masks.within_budget([s.cuda() for s in scores], prices, budget, [1, 20, 1])
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recipe_trains_resumes_and_finishes(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(fashion_mnist, "load", lambda folder=None: synthetic())
    AcceleratorState._reset_state(reset_partial_state=True)
    made = recipe(method={"name": "autosparse", "target": 0.8}, precision=precision, data={"augment": "crop-flip"})
    with pytest.raises(RuntimeError, match="stopped after step 7"):
        Classification(made, tmp_path).train(stop_at(7))
    run = Classification(made, tmp_path, resume=True)
    assert run.batches.images.is_cuda
    summary = run.train()
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert records(tmp_path)[-1]["step"] == run.total_steps
    assert json.loads((tmp_path / "environment.json").read_text())["device"].startswith("cuda")


def numbers(dtype):
    """Every number of a short format; of float32 all exponents of both signs, infinities and NaN."""
    fmt = aten.FORMAT_OF[dtype]
    bits = fmt.all_bits() if fmt.bits <= 16 else torch.arange(0, 2**32, 9973).numpy()
    return torch.from_numpy(bits.astype(fmt.dtype)).view(dtype)


def same(there, here):
    """Compare bits; one NaN is as good as another."""
    there, integer = there.cpu(), INTEGER[here.element_size()]
    wrong = (there.view(integer) != here.view(integer)) & ~(there.float().isnan() & here.float().isnan())
    assert not wrong.any(), (int(wrong.sum()), there[wrong][:5], here[wrong][:5])


def launches(step):
    """The names of the kernels that a call launches."""
    step()
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtype", aten.FORMAT_OF, ids=str)
@pytest.mark.parametrize(("function", "mode"), MODES)
def test_activations_have_the_bits_of_the_cpu(function, mode, dtype):
    x, call = numbers(dtype), functools.partial(ACTIVATIONS[function], mode=mode)
    given = x.cuda()
    same(call(given), call(x))
    assert isinstance(launch.ready[function, mode, dtype, given.device, kernels.isa()], gpu.Kernel)
    with kernels.forced("pytorch"):
        same(call(given), call(x))


@pytest.mark.parametrize("dtype", aten.FORMAT_OF, ids=str)
@pytest.mark.parametrize(("function", "mode"), MODES)
def test_gradients_are_those_of_the_cpu(function, mode, dtype):
    call = ACTIVATIONS[function]
    for grad in gradients.forms(function, mode):
        x = numbers(dtype)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = []
        for device in ("cpu", "cuda"):
            leaf = x.to(device, copy=True).requires_grad_()
            result = call(leaf, mode, grad=grad)
            found.append(torch.autograd.grad(result, leaf, upstream.to(device))[0].cpu())
        here, there = found
        if dtype.itemsize == 1 or (not gradients.is_one_operator(function, mode, grad, dtype) and dtype.itemsize == 2):
            same(there, here)  # of slopes that are looked up
        else:  # PyTorch's operators, which round more than once on a GPU, and float32, whose exp is another
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(there, here, rtol=max(16 * eps, 1e-5), atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", aten.FORMAT_OF, ids=str)
def test_one_launch_each_way(dtype):
    x = torch.randn(4096, device="cuda").to(dtype)
    for function, mode in MODES:
        call = functools.partial(ACTIVATIONS[function], mode=mode)
        assert len(launches(lambda call=call: call(x))) == 1, (function, mode)
        leaf = x.clone().requires_grad_()
        result, upstream = call(leaf), torch.ones_like(x)
        back = functools.partial(torch.autograd.grad, result, leaf, upstream, retain_graph=True)
        assert len(launches(back)) == 1, (function, mode, launches(back))


@pytest.mark.parametrize("dtype", aten.FORMAT_OF, ids=str)
def test_layouts_tails_and_places(dtype):
    x = torch.randn(7, 6, 33, 20).to(dtype)
    views = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2),
        lambda t: t[:, ::2, 1:],
        lambda t: t[:1].expand(3, -1, -1, -1),
        lambda t: t.flatten()[1:],
        lambda t: t.flatten()[:1023],
        lambda t: t[0, 0, 0, 0],
        lambda t: t[:0],
    ]
    for view in views:
        here, there = view(x), view(x.cuda())
        expected = act.silu(here)
        got = act.silu(there)
        same(got, expected)
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
        out = torch.empty_like(there)
        assert act.silu(there, out=out) is out
        same(out, expected)
        leaf = there.clone().requires_grad_()
        (found,) = torch.autograd.grad(act.silu(leaf, "hard"), leaf, torch.ones_like(leaf).expand_as(leaf))
        same(found, gradients.backward(torch.ones_like(here), here, "silu", "hard", "x"))
    place = x.cuda().flatten()
    expected = act.tanh(x.flatten())
    assert act.tanh(place, out=place) is place
    same(place, expected)


def test_more_than_2_to_the_31_elements():
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("needs 11 GB")
    x = torch.zeros(count, dtype=torch.uint8, device="cuda").view(torch.float8_e5m2)
    x[-3:] = torch.tensor([1.0, -1.0, 0.5], device="cuda").to(x.dtype)
    act.silu(x, out=x)
    assert x[-4:].float().tolist() == [0.0, *act.silu(torch.tensor([1.0, -1.0, 0.5]).to(x.dtype)).float().tolist()]
    assert int(x.view(torch.uint8)[:-3].count_nonzero()) == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_activations_never_wait_for_the_gpu():
    x = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    act.silu(x, "hard")
    act.silu(leaf, "hard").sum().backward()
    act.silu_and_mul(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        act.silu(x, "hard")
        act.silu(leaf, "hard").sum().backward()
        act.silu_and_mul(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_activations_in_a_graph(dtype):
    x = torch.randn(5000, device="cuda").to(dtype).requires_grad_()
    upstream = torch.ones_like(x)

    def step():
        y = act.silu(x, "hard")
        return y, torch.autograd.grad(y, x, upstream)[0], act.tanh(x.detach())

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        x.copy_(torch.randn(5000, device="cuda").to(dtype))
    graph.replay()
    for found, expected in zip(results, step(), strict=True):
        same(found.detach(), expected.detach().cpu())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_the_first_call_is_not_captured():
    x = torch.randn(64, device="cuda").half()
    gpu._forward.cache_clear()
    launch.ready.clear()
    with (
        pytest.raises(RuntimeError, match="call it once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        act.gelu(x)
    same(act.gelu(x), act.gelu(x.cpu()))


def test_transforms_of_activations():
    x = torch.randn(5, 64, dtype=torch.float64).float().cuda()
    for function in ACTIVATIONS.values():
        assert torch.equal(torch.vmap(function)(x), function(x))
        second = torch.func.grad(torch.func.grad(function))(x[0, 0])
        leaf = x[0, 0].clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        (again,) = torch.autograd.grad(first, leaf)
        torch.testing.assert_close(second, again)


def test_activations_on_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(4096, device="cuda:1", dtype=torch.bfloat16)
    for _ in range(2):  # compiled, and launched
        same(act.silu(x), act.silu(x.cpu()))
        assert torch.cuda.current_device() == 0


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("function", "mode"), MODES)
def test_a_compiled_activation_has_the_bits_of_the_eager_one(function, mode, dtype):
    torch._dynamo.reset()
    x, given = numbers(dtype).cuda(), functools.partial(ACTIVATIONS[function], mode=mode)
    same(torch.compile(given, fullgraph=True)(x), given(x).cpu())


@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_a_compiled_activation_under_cuda_graphs():
    for dtype in (torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        x = torch.randn(4096, device="cuda").to(dtype)
        compiled = torch.compile(lambda x: act.silu(act.gelu(x) + 1.0), mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            same(compiled(x).clone(), act.silu(act.gelu(x) + 1.0).cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("function", GATED)
def test_gated_units_have_the_bits_of_the_cpu(function, mode, dtype):
    call, gate = GATED[function], numbers(dtype)
    generator = torch.Generator().manual_seed(0)
    up, upstream = (torch.randn(gate.shape, generator=generator).to(dtype) for _ in range(2))
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (gate, up)]
        result = call(*leaves, mode)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, upstream.to(device))])
    for here, there in zip(*found, strict=True):
        same(there, here)


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("width", [64, 2080, 26, 1])
def test_gated_halves(width):
    x = torch.randn(5, 3, 2 * width).bfloat16()
    there, here = x.cuda().requires_grad_(), x.clone().requires_grad_()
    results = [act.silu_and_mul(t) for t in (there, here)]
    same(results[0].detach(), results[1].detach())
    for result in results:
        result.float().square().sum().backward()
    same(there.grad, here.grad)
    same(torch.compile(act.silu_and_mul, fullgraph=True)(x.cuda()), results[1].detach())
    if width % 16 == 0:
        assert len(launches(lambda: act.silu_and_mul(there.detach()))) == 1


@pytest.mark.filterwarnings("ignore:the cost of", "ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torch.nn.LSTM(16, 8, 2, bidirectional=True, batch_first=True), (2, 5, 16)),
        (lambda: torch.nn.LSTM(16, 8, 2, bias=False, proj_size=4, batch_first=True), (2, 5, 16)),
        (lambda: torch.nn.GRU(16, 8, 2), (5, 2, 16)),
        (lambda: torch.nn.RNN(16, 8), (5, 16)),
        (lambda: torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 4, 16)),
        (lambda: torch.nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5)),
    ],
)
def test_a_network_costs_what_it_costs_on_the_cpu(make, shape, precision):
    model, x = make(), torch.randn(shape)
    expected = cost.count(model, x, "rigl")
    with torch.autocast("cuda", dtype=precision, enabled=precision is not torch.float32):
        found = cost.count(model.cuda(), x, "rigl")
    assert found.layers == expected.layers
    assert sum(found.uncounted.values()) == sum(expected.uncounted.values())


def test_packed_sequences_cost_what_they_cost_on_the_cpu():
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 16), torch.tensor([5, 3, 1]), batch_first=True)
    model = torch.nn.LSTM(16, 8, 2)
    assert cost.count(model, packed).layers == cost.count(model.cuda(), packed).layers


@pytest.mark.parametrize("mode", ["exact", "ktanh", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_are_those_of_the_cpu(kind, dtype, mode):
    torch.manual_seed(0)
    layer = getattr(act, kind)(24, 37, 2, mode=mode, dtype=dtype, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 24).to(dtype) for n in (9, 7, 7, 2)])
    found = {}
    for device in ("cpu", "cuda"):
        moved = getattr(act, kind)(24, 37, 2, mode=mode, dtype=dtype, bidirectional=True).to(device)
        moved.load_state_dict(layer.state_dict())
        x = packed.data.to(device, copy=True).requires_grad_()
        y, after = moved(torch.nn.utils.rnn.PackedSequence(x, packed.batch_sizes))
        states = after if isinstance(after, tuple) else (after,)
        sum((each.float() ** 2).sum() for each in (y.data, *states)).backward()
        found[device] = [y.data, *states, x.grad, *(p.grad for p in moved.parameters())]
    bound = 2**-14 if dtype == torch.float32 else 2**-4 if dtype == torch.bfloat16 else 2**-7
    if mode == "hard" and dtype != torch.float32:  # its slopes jump, so a last place decides
        bound = 0.25
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert on_gpu.dtype == on_cpu.dtype
        far = (on_gpu.cpu().float() - on_cpu.float()).abs().max()
        assert far <= bound * (1 + on_cpu.float().abs().max())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_recurrent_layer_is_captured(kind, dtype):
    torch.manual_seed(0)
    layer = getattr(act, kind)(16, 32, dtype=dtype, device="cuda")
    x, other = (torch.randn(5, 4, 16, device="cuda", dtype=dtype) for _ in range(2))
    place = x.clone().requires_grad_()

    def step():
        y = layer(place)[0]
        return y, *torch.autograd.grad(y.float().square().sum(), [place, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for content in (x, other):
        with torch.no_grad():
            place.copy_(content)
        graph.replay()
        replayed = [each.detach().clone() for each in captured]
        for one, again in zip(replayed, step(), strict=True):
            assert torch.equal(one, again.detach())
