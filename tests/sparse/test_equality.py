"""Training around the optimizer's steps is training of re-parametrised layers: against plain autograd, step by step."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy import sparse
from rarefy.sparse import ST3, Latent, TopK, TopKAST

STEPS = 60
DATA = torch.Generator().manual_seed(5)
IMAGES, LABELS = torch.randn(512, 1, 12, 12, generator=DATA), torch.randint(5, (512,), generator=DATA)
LAYERS = ("0.weight", "3.weight", "6.weight")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 5),
    )


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, output: Callable[[Tensor], Tensor]) -> None:
    for step in range(STEPS):
        part = slice(step * 64 % 512, step * 64 % 512 + 64)
        optimizer.zero_grad()
        F.cross_entropy(output(IMAGES[part].to(torch.get_default_dtype())), LABELS[part]).backward()
        optimizer.step()


def reference(used: Callable[[int, Tensor], Tensor], own: nn.Parameter | None = None) -> list[Tensor]:
    """The dense weights after training a model whose layers compute with ``used(layer, W)``."""
    model = network()
    groups = [{"params": list(model.parameters())}]
    if own is not None:
        groups.append({"params": [own], "weight_decay": 0.0})
    weights = [model.get_parameter(name) for name in LAYERS]

    def output(images: Tensor) -> Tensor:
        values = {name: used(index, weight) for index, (name, weight) in enumerate(zip(LAYERS, weights, strict=True))}
        return torch.func.functional_call(model, values, (images,))

    train(model, sgd(groups), output)
    return [weight.detach() for weight in weights]


def trained(method: str, **options) -> tuple[list[Tensor], list[Tensor], sparse.Sparsifier]:
    """The dense weights and the weights used after training with a method, and its sparsifier."""
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = sparse.create(method, model, **options).attach(optimizer)
    train(model, optimizer, model)
    return sparsifier.latents(), [model.get_parameter(name).detach() for name in LAYERS], sparsifier


class Straight(torch.autograd.Function):
    """A value, and the gradient that is said to be that of the weight."""

    @staticmethod
    def forward(ctx, weight, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


class Rectifier(torch.autograd.Function):
    """h(x) = max(x, 0), h'(x) = 1 if x > 0 else alpha."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return x.clamp(min=0.0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, grad, ctx.alpha * grad), None


def thresholds_of(sparsifier: sparse.Sparsifier) -> Tensor:
    """The s of every layer."""
    kept = sparsifier.state_dict()["layers"]
    return torch.cat([kept[name]["own.s"] for name in ("0", "3", "6")])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_autosparse_and_str(alpha):
    first = thresholds_of(sparse.create("str", network(), total_steps=10_000))
    s = nn.Parameter(first.clone())
    expected = reference(lambda i, w: w.sign() * Rectifier.apply(w.abs() - torch.sigmoid(s[i]), alpha), s)
    # A long run of which these are the first steps: pressure, floors and landing have their own tests.
    options = {"total_steps": 10_000, "pressure": 0.0}
    if alpha:
        dense, _, sparsifier = trained("autosparse", alpha=alpha, anneal="constant", **options)
    else:
        dense, _, sparsifier = trained("str", **options)
    assert (s.detach() - first).abs().max() > 0.001, "thresholds learn"
    torch.testing.assert_close(thresholds_of(sparsifier), s.detach(), rtol=1e-5, atol=0)
    for mine, theirs in zip(dense, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_autosparse_with_fixed_thresholds_bit_for_bit():
    options = {"total_steps": 10_000, "pressure": 0.0, "threshold_lr": 0.0}
    threshold = torch.sigmoid(thresholds_of(sparse.create("autosparse", network(), **options)))
    expected = reference(lambda i, w: w.sign() * Rectifier.apply(w.abs() - threshold[i], 0.5))
    dense, used, _ = trained("autosparse", alpha=0.5, anneal="constant", **options)
    for mine, shown, theirs, t in zip(dense, used, expected, threshold, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(shown, theirs.sign() * (theirs.abs() - t).clamp(min=0.0))


@pytest.mark.parametrize("rescale", [False, True])
def test_st3_bit_for_bit(rescale, request):
    if rescale:  # The order of sums over channels: in float32 it moves a weight over its threshold, and the runs part.
        torch.set_default_dtype(torch.float64)
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    # The thresholds of the first masks, throughout
    options = {"target": 0.8, "total_steps": 1000, "update_every": 1000, "start": 0.0, "end": 0.0, "rescale": rescale}
    thresholds = [state.threshold for state in sparse.create("st3", network(), **options).layers()]

    def used(index, weight):
        size = weight.detach().abs()
        shrunk = (size - thresholds[index]).clamp(min=0.0)
        if rescale:
            share = shrunk.flatten(1).sum(1) / size.flatten(1).sum(1)
            shrunk = shrunk * (1.01 / (share + 0.01)).view(-1, *[1] * (weight.dim() - 1))
        return Straight.apply(weight, shrunk.copysign(weight.detach()), 1.0)

    dense, shown, _ = trained("st3", **options)
    for index, (mine, seen, theirs) in enumerate(zip(dense, shown, reference(used), strict=True)):
        if rescale:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        else:
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(seen, used(index, theirs), rtol=1e-4, atol=1e-6)


def test_topk_bit_for_bit_with_new_masks_in_every_step():
    def best(weight, k):
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[weight.detach().abs().flatten().argsort(descending=True, stable=True)[:k]] = True
        return mask.view(weight.shape)

    def used(_, weight):
        live, explored = best(weight, live_counts[_]), best(weight, weight.numel() // 2)
        return Straight.apply(weight, weight.detach() * live, live + 0.6 * (explored & ~live))

    options = {"target": 0.8, "total_steps": 1000, "update_every": 1, "alpha": 0.6, "anneal": "constant"}
    dense, shown, sparsifier = trained("topk", **options)
    live_counts = sparsifier.live_counts(0.2)
    for index, (mine, seen, theirs) in enumerate(zip(dense, shown, reference(used), strict=True)):
        assert torch.equal(mine, theirs)
        assert torch.equal(seen, used(index, theirs))


def test_powerpropagation_bit_for_bit_while_dense():
    def phi(weight):
        return weight.abs().pow(0.5).copysign(weight)

    model = network()
    with torch.no_grad():
        for name in LAYERS:
            model.get_parameter(name).copy_(phi(model.get_parameter(name)))
    weights = {name: model.get_parameter(name) for name in LAYERS}
    train(
        model,
        sgd(model.parameters()),
        lambda x: torch.func.functional_call(model, {name: w * w.abs() for name, w in weights.items()}, (x,)),
    )
    dense, *_ = trained("powerprop", target=0.8, total_steps=10_000)
    for mine, theirs in zip(dense, weights.values(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ST3, {"rescale": False, "alpha": 0.0}),
        (TopK, {"alpha": 0.0, "backward_density": 0.0}),
        (TopKAST, {"superset": 1.0, "exploration": False}),
        (TopKAST, {"superset": 1.0, "exploration": False, "power": 2.0}),
    ],
)
def test_the_gradient_that_a_method_states_is_that_of_its_value(method, options):
    class Derived(method):
        gradient = Latent.gradient

    ends = []
    for kind in (method, Derived):
        model = network()
        optimizer = sgd(model.parameters())
        sparsifier = kind(model, target=0.8, total_steps=STEPS, **options).attach(optimizer)
        train(model, optimizer, model)
        ends.append(sparsifier.latents())
    for stated, derived in zip(*ends, strict=True):
        torch.testing.assert_close(stated, derived, rtol=1e-4, atol=1e-6)
