"""Accelerated training: the same outputs, gradients, losses and masks, and a model that knows nothing of it."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import kernels, sparse
from rarefy.sparse.acceleration import Choice, choices, interception

from ..apart import apart
from .methods import EVERY, Run

pytestmark = pytest.mark.skipif(
    not any(k.name == "sparse_forward_f32" for k in kernels.table()), reason="no native library"
)

FASTEST = choices.fastest


@pytest.fixture(autouse=True)
def _sparse_wins(monkeypatch):
    """Nothing here depends on what is faster: the kernels win wherever they may run, and they may everywhere."""
    monkeypatch.setattr(choices, "fastest", lambda dense, sparse: (2.0, 1.0))
    monkeypatch.setattr(choices, "DENSEST", 1.0)
    monkeypatch.setattr(choices, "AGAIN", 1.0)


def thinned(model, density):
    """A model with random zeros, and a sparsifier of hard masks on them that is attached and accelerated."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= torch.rand(module.weight.shape, generator=generator) < density
    sparsifier = Given(model, total_steps=10, target=0.5)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    return sparsifier


class Given(sparse.Masked):
    """Hard masks of the weights that are not 0."""

    info = sparse.Static.info

    def initial_masks(self):
        return [weight != 0 for weight in self.weights()]


def outcome(model, x, g=None):
    """The output, and the gradients of the input, the weight and the bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if g is None else g
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], g.to(y.dtype))]


def check(model, x, density, *, calls=3):
    """Accelerated and in float64, where the gradient of masked weights is cut."""
    sparsifier = thinned(model, density)
    expected = outcome(copy.deepcopy(model).double(), x.double())
    expected[2] = expected[2] * (model.weight != 0)
    handle = sparse.accelerate(sparsifier)
    found = outcome(model, x)
    assert sum(choice.calls for choice in handle.choices()) == calls
    handle.restore()
    plain = outcome(model, x)
    # a dimension of one place has any stride
    assert all(a == b for a, b, n in zip(found[0].stride(), plain[0].stride(), plain[0].shape, strict=True) if n > 1)
    for ours, theirs, right in zip((t.detach() for t in found), plain, (t.detach() for t in expected), strict=True):
        assert ours.shape == theirs.shape
        scale = right.abs().max().clamp(min=1e-30)
        assert float((ours.double() - right).abs().max() / scale) < 3e-6
    return found


DENSITIES = [0.0, 0.05, 0.3, 1.0]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (200, 40), (2, 3, 5, 40), (40,)], ids=str)
def test_linear(shape, density):
    check(nn.Linear(40, 24), torch.randn(shape), density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": (3, 1), "padding": (1, 0), "dilation": (2, 1)},
    ],
    ids=str,
)
def test_conv(options, batch, memory, density):
    model = nn.Conv2d(12, 20, **options).to(memory_format=memory)
    check(model, torch.randn(batch, 12, 11, 9).contiguous(memory_format=memory), density)


def test_layouts_may_be_mixed():
    last = torch.channels_last
    check(nn.Conv2d(12, 20, 3, padding=1), torch.randn(2, 12, 8, 8).to(memory_format=last), 0.2)
    check(nn.Conv2d(12, 20, 3, padding=1).to(memory_format=last), torch.randn(2, 12, 8, 8), 0.2)
    check(nn.Conv2d(12, 20, 1).to(memory_format=last), torch.randn(2, 12, 8, 8), 0.2)
    check(nn.Conv2d(1, 20, 3, padding=1), torch.randn(2, 1, 8, 8).to(memory_format=last), 0.5)
    check(nn.Conv2d(12, 20, 1), torch.randn(2, 12, 1, 1), 0.3)


def test_inputs_without_order_in_memory():
    x = torch.randn(12, 9, 3, 10).permute(2, 0, 1, 3)[:, :, ::2, 1:]
    assert not x.is_contiguous()
    check(nn.Conv2d(12, 20, 3, padding=1), x, 0.2)
    check(nn.Linear(40, 24), torch.randn(40, 9).t(), 0.2)
    check(nn.Linear(40, 24), torch.randn(9, 80)[:, ::2], 0.2)
    check(nn.Linear(40, 24), torch.randn(1, 40).expand(9, 40), 0.2)


def test_a_gradient_that_is_one_number():
    model = nn.Conv2d(12, 20, 3, padding=1)
    x = torch.randn(2, 12, 8, 8)
    handle = sparse.accelerate(thinned(model, 0.2))
    ours = torch.autograd.grad(model(x).sum(), model.parameters())
    handle.restore()
    theirs = torch.autograd.grad(model(x).sum(), model.parameters())
    torch.testing.assert_close(ours[0], theirs[0] * (model.weight != 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1])


def test_only_what_is_wanted_is_computed():
    model = nn.Linear(40, 24)
    sparsifier = thinned(model, 0.2)
    handle = sparse.accelerate(sparsifier)
    x = torch.randn(9, 40)

    def calls():
        return [sum(c.calls for c in handle.choices() if c.product == product) for product in choices.PRODUCTS]

    model(x).sum().backward()
    assert calls() == [1, 0, 1]
    with torch.no_grad():
        assert not model(x).requires_grad
    assert calls() == [2, 0, 1]
    with torch.inference_mode():
        model(x)
    assert calls() == [3, 0, 1]
    model.weight.requires_grad_(False)
    model(x.requires_grad_()).sum().backward()
    assert calls() == [4, 1, 1]


def test_pytorch_computes_what_is_not_ours():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv1d(8, 8, 1),
    )
    handle = sparse.accelerate(thinned(model, 0.2))
    x = torch.randn(2, 8, 6, 6)
    for conv in model[:4]:
        torch.testing.assert_close(conv(x), type(conv)._conv_forward(conv, x, conv.weight, conv.bias))
    model[4](x.flatten(2))
    assert handle.choices() == []
    handle.restore()


def accelerated(density=0.2):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 8))
    sparsifier = thinned(model, density)
    return model, sparsifier, sparse.accelerate(sparsifier)


def count(handle):
    return sum(choice.calls for choice in handle.choices())


@pytest.mark.parametrize(
    "how", ["float64", "bfloat16", "autocast", "vmap", "jvp", "empty", "unbatched", "trace", "mode"]
)
def test_other_calls_fall_through(how):
    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6)
    if how in ("float64", "bfloat16"):
        dtype = getattr(torch, how)
        model.to(dtype)
        assert model(x.to(dtype)).dtype is dtype
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
    elif how == "vmap":
        y = torch.vmap(model)(x.unsqueeze(1))
        assert y.shape == (2, 1, 8)
    elif how == "jvp":
        with warnings.catch_warnings():  # of PyTorch about itself
            warnings.simplefilter("ignore")
            with torch.autograd.forward_ad.dual_level():
                y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
                assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    elif how == "empty":
        assert model[0](x[:0]).shape == (0, 8, 6, 6)
        assert model[2](torch.empty(0, 288)).shape == (0, 8)
    elif how == "unbatched":
        assert model[0](x[0]).shape == (8, 6, 6)
    elif how == "trace":
        from torch.fx.experimental.proxy_tensor import make_fx

        assert "convolution" in make_fx(model)(x).code
    else:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * 2 * (36 * 8 * 72 + 288 * 8)
    assert count(handle) == 0


def test_wrong_inputs_raise_what_pytorch_raises():
    model, _, handle = accelerated()
    for wrong in (torch.randn(2, 7, 6, 6), torch.randn(2, 8)):
        with pytest.raises(RuntimeError):
            model(wrong)
    with pytest.raises(TypeError):
        model[2](3)
    handle.restore()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert count(handle) == 2  # those of the model itself
    torch._dynamo.reset()


def test_second_derivatives():
    for layer, x in [(nn.Linear(6, 5), torch.randn(3, 6)), (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5))]:
        handle = sparse.accelerate(thinned(layer, 0.4))

        def penalty(layer=layer, x=x):
            x = x.clone().requires_grad_()
            (of_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(of_x.square().sum(), list(layer.parameters()))

        live = (layer.weight != 0, torch.ones_like(layer.bias, dtype=torch.bool))
        ours = penalty()
        assert count(handle) > 0
        handle.restore()
        for a, b, mask in zip(ours, penalty(), live, strict=True):
            torch.testing.assert_close(a[mask], b[mask], rtol=1e-4, atol=1e-4)


def test_weights_that_change_behind_our_back_are_computed_right():
    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for change in (
            lambda w: w.data.copy_(torch.randn(w.shape)),  # leaves no mark
            lambda w: w.mul_(torch.rand(w.shape) < 0.1),
            lambda w: w.zero_(),
            lambda w: w.view(-1)[3:4].fill_(2.0),
        ):
            change(model[0].weight)
            found = model[0](x)
            torch.testing.assert_close(found, F.conv2d(x, model[0].weight, model[0].bias, 1, 1), rtol=1e-4, atol=1e-4)
    handle.restore()


def test_a_weight_that_changes_between_forward_and_backward_is_told():
    model, _, handle = accelerated()
    y = model(torch.randn(2, 8, 6, 6))
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    handle.restore()


def test_a_live_weight_that_is_zero_gets_its_gradient():
    model = nn.Linear(6, 4)
    sparsifier = thinned(model, 0.5)
    live = (
        sparsifier.live_masks()[""] if "" in sparsifier.live_masks() else next(iter(sparsifier.live_masks().values()))
    )
    with torch.no_grad():
        model.weight.zero_()
    handle = sparse.accelerate(sparsifier)
    model(torch.ones(2, 6)).sum().backward()
    assert torch.equal(model.weight.grad, 2.0 * live)
    assert count(handle) > 0
    handle.restore()


def test_the_model_knows_nothing_of_it():
    model, sparsifier, handle = accelerated()
    for mine, fresh in ((model[0], nn.Conv2d(8, 8, 3, padding=1)), (model[2], nn.Linear(288, 8))):
        assert type(mine) is type(fresh)
        assert {k: v for k, v in vars(mine).items() if k != "_parameters"} == {
            k: v for k, v in vars(fresh).items() if k != "_parameters"
        }
        assert type(mine.weight) is nn.Parameter
        assert vars(mine.weight) == {}
    x = torch.randn(2, 8, 6, 6)
    expected = model(x)
    used = count(handle)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(sparsifier).model):
        assert other.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
    assert count(handle) == used  # copies are PyTorch's
    assert copy.deepcopy(sparsifier)._acceleration is None


def test_restore():
    model, sparsifier, handle = accelerated()
    other = accelerated()[2]
    handle.restore()
    handle.restore()
    assert not handle.active
    assert sparsifier._acceleration is None
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(model[0](x), F.conv2d(x, model[0].weight, model[0].bias, 1, 1))
    other.restore()
    gc.collect()
    interception.let_go([])
    assert nn.Linear.forward is interception.linear_forward
    assert nn.Conv2d._conv_forward is interception.conv_forward


def test_a_backward_pass_after_restore():
    model, _, handle = accelerated()
    y = model(torch.randn(2, 8, 6, 6))
    handle.restore()
    y.sum().backward()
    assert torch.count_nonzero(model[2].weight.grad) > model[2].weight.count_nonzero()  # dense: nothing is cut


def test_accelerating_twice_replaces():
    _, sparsifier, first = accelerated()
    second = sparse.accelerate(sparsifier)
    assert not first.active
    assert second.active


def test_it_goes_with_the_sparsifier():
    model, sparsifier, handle = accelerated()
    weight = model[2].weight
    assert interception.find(weight) is not None
    del handle, sparsifier
    gc.collect()
    assert interception.find(weight) is None
    model(torch.randn(2, 8, 6, 6)).sum().backward()


def test_what_is_no_sparsifier():
    with pytest.raises(TypeError, match="takes a sparsifier, got Linear"):
        sparse.accelerate(nn.Linear(2, 2))


def test_without_the_library():
    sparsifier = thinned(nn.Linear(4, 4), 0.5)
    with kernels.forced("pytorch"), pytest.raises(RuntimeError, match="rarefy info"):
        sparse.accelerate(sparsifier)


def test_pytorch_alone_after_it_was_forced():
    model, _, handle = accelerated()
    with kernels.forced("pytorch"):
        model(torch.randn(2, 8, 6, 6)).sum().backward()
    assert count(handle) == 0


def test_other_kernels_after_they_were_forced():
    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6)
    expected = model(x)
    expected.sum().backward()
    first = model[0].weight.grad.clone()
    for isa in sorted({k.isa for k in kernels.table() if k.supported and k.name == "sparse_lanes"}):
        with kernels.forced(isa):
            y = model(x)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        model.zero_grad()
        y.sum().backward()  # by the best kernels again, whose vectors may be longer
        live = model[0].weight != 0
        torch.testing.assert_close(model[0].weight.grad[live], first[live], rtol=1e-4, atol=1e-4)
    handle.restore()


@pytest.mark.parametrize("case", EVERY)
def test_every_method_trains_alike(case):
    # From the same state at every step: a weight that rounding put on the other side of its threshold ends two runs.
    plain, fast = Run(case, total_steps=30), Run(case, total_steps=30)
    handle = sparse.accelerate(fast.sparsifier)
    for _ in range(30):
        plain.load(copy.deepcopy(fast.state()))
        images, labels = fast.batch(fast.sparsifier.steps)
        found = []
        for run in (plain, fast):
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.model(images), labels)
            loss.backward()
            run.optimizer.step()
            found.append([loss, *run.model.parameters()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert count(handle) > 0


def test_the_weight_gradient_is_sparse_once_alpha_is_zero():
    run = Run("autosparse-channel", total_steps=30)
    handle = sparse.accelerate(run.sparsifier)
    run.train(30)
    sparse_gradients = sum(c.calls for c in handle.choices() if c.product == "weight gradient")
    assert run.sparsifier.alpha_now == 0.0
    assert 0 < sparse_gradients < sum(c.calls for c in handle.choices() if c.product == "input gradient")


def test_rigl_has_dense_gradients_where_it_looks():
    run = Run("rigl", total_steps=20, update_every=4)
    sparse.accelerate(run.sparsifier)
    for step in range(1, 15):
        images, labels = run.batch(run.sparsifier.steps)
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(images), labels).backward()
        masked = run.plain[0].weight.grad[~run.sparsifier.live_masks()["0"]]
        assert bool((masked != 0).any()) == (step % 4 == 0)
        run.optimizer.step()


def test_after_finalize_every_weight_has_its_gradient():
    run = Run("gmp", total_steps=30)
    handle = sparse.accelerate(run.sparsifier)
    run.train(30)
    run.sparsifier.finalize()
    used = sum(c.calls for c in handle.choices() if c.product == "output")
    images, labels = run.batch(0)
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(images), labels).backward()
    assert sum(c.calls for c in handle.choices() if c.product == "output") > used
    weight = run.plain[0].weight
    assert bool((weight.grad[weight == 0] != 0).any())
    handle.restore()


def test_accumulated_gradients():
    found = []
    for accelerate in (False, True):
        run = Run("rigl", total_steps=20)
        if accelerate:
            sparse.accelerate(run.sparsifier)
        for step in range(6):
            images, labels = run.batch(step)
            F.cross_entropy(run.model(images), labels).backward()
            if step % 2:
                run.optimizer.step()
                run.optimizer.zero_grad()
        found.append(run.plain[0].weight.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_checkpointed_activations():
    from torch.utils.checkpoint import checkpoint

    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    model(x).sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    for a, b in zip([x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(a, b)
    handle.restore()


def _replica(accelerate):
    run = Run("rigl", total_steps=20, wrap=nn.parallel.DistributedDataParallel)
    handle = sparse.accelerate(run.sparsifier) if accelerate else None
    run.train(10)
    return torch.cat([p.detach().flatten() for p in run.plain.parameters()]), handle and count(handle)


def _replicas():
    return [_replica(accelerate) for accelerate in (False, True)]


def test_ddp(tmp_path):
    (((plain, _), (found, used)),) = apart(_replicas, tmp_path)
    assert used > 0
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


# What is chosen


@pytest.fixture
def choice():
    return Choice("fc", "output", (2, 4))


@pytest.fixture
def _as_it_is(monkeypatch):
    monkeypatch.setattr(choices, "DENSEST", 0.6)
    monkeypatch.setattr(choices, "AGAIN", 0.8)


@pytest.mark.usefixtures("_as_it_is")
def test_a_choice_narrows_down_where_the_two_meet(choice, monkeypatch):
    seconds = {0.6: (1.0, 1.5), 0.3: (1.0, 0.8), 0.4: (1.0, 1.1), 0.12: (1.0, 0.3)}

    def time(density):
        monkeypatch.setattr(choices, "fastest", lambda dense, sparse: seconds[density])
        choice.measure(density, lambda: None, lambda: None)

    assert not choice.open(0.7)  # too dense to be asked
    assert choice.open(0.6)
    time(0.6)
    assert not choice.open(0.5)  # too near to where it was slower
    assert not choice.sparse(0.5)
    assert choice.open(0.3)
    time(0.3)
    assert choice.sparse(0.3)
    assert choice.seconds_saved == pytest.approx(0.2)
    assert choice.open(0.4)  # denser again
    time(0.4)
    assert not choice.sparse(0.4)
    assert (choice.sparse_from, choice.dense_from) == (0.3, 0.4)
    assert choice.sparse(0.2)
    assert choice.open(0.12)  # it saves more by now
    time(0.12)
    assert choice.sparse(0.12)
    assert choice.seconds_saved == pytest.approx(0.2 + 0.2 + 0.7)
    assert choice.calls == 3


@pytest.mark.usefixtures("_as_it_is")
def test_a_kernel_that_loses_is_not_used(monkeypatch):
    monkeypatch.setattr(choices, "fastest", lambda dense, sparse: (1.0, 2.0))
    model, _, handle = accelerated()
    x = torch.randn(2, 8, 6, 6)
    model(x).sum().backward()
    assert count(handle) == 0
    assert {c.product for c in handle.choices()} == {*choices.PRODUCTS}
    assert -1.0 < handle.seconds_saved <= 0.0  # what the indices took
    monkeypatch.setattr(choices, "fastest", lambda dense, sparse: pytest.fail("it was timed already"))
    model(x).sum().backward()


def test_masks_that_change_in_every_step_cost_no_more_than_they_save(monkeypatch):
    model, _, handle = accelerated()
    layer = interception.find(model[0].weight)
    x = torch.randn(2, 8, 6, 6)
    gains = {True: 10.0, False: 1e-9}  # what a product saves, in seconds
    for pays, gain in gains.items():
        monkeypatch.setattr(choices, "fastest", lambda dense, sparse, gain=gain: (gain, 0.0))
        layer.choices.clear()
        layer.upkeep, used = 0.0, []
        for _ in range(5):
            with torch.no_grad():
                model[0].weight.copy_(model[0].weight[torch.randperm(8)] * 2.0)
                found = model[0](x)
                torch.testing.assert_close(
                    found, F.conv2d(x, model[0].weight, model[0].bias, 1, 1), rtol=1e-4, atol=1e-4
                )
            used.append(sum(choice.calls for choices in layer.choices.values() for choice in choices.values()))
        assert used[-1] == (5 if pays else 1)
    assert layer.spent > 0.0
    handle.restore()


def test_both_are_timed_in_turn():
    order = []
    timed = FASTEST(lambda: order.append("a"), lambda: order.append("b"))
    least, most = choices.ROUNDS
    assert least <= len(order) // 2 <= most
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(timed) == 2
    assert all(0.0 <= t < 1.0 for t in timed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_other_models_can_be_scripted():
    _, _, handle = accelerated()
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Conv2d(3, 3, 1), nn.Linear(4, 3))
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    handle.restore()
