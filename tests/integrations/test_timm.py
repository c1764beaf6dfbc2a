"""A loop with timm's models, optimizers, groups and schedulers; nothing of rarefy is made for them."""

import copy
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import models, sparse

pytestmark = pytest.mark.slow

STEPS = 20


class Unused(ModuleType):
    """A module of torchvision, in which every name is a class; timm imports it and no test makes one."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(
            name, (nn.Module,), {"NEAREST": 0, "LANCZOS": 1, "BILINEAR": 2, "BICUBIC": 3, "BOX": 4, "HAMMING": 5}
        )


@pytest.fixture(scope="module")
def timm():
    # The torchvision that goes with PyTorch's builds for the CPU is not on PyPI.
    names = [
        f"torchvision{name}" for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets")
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, Unused(name))
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
        pytest.importorskip("timm", reason="timm is not installed")
        import timm.optim
        import timm.scheduler
    return timm


def network(timm):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (16,), generator=generator)
    return torch.randn(16, 3, 16, 16, generator=generator) + labels[:, None, None, None] / 4, labels


def train(model, optimizer, scheduler, steps):
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step_update(step + 1)


def made(timm, method, opt, **options):
    model = network(timm)
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=2e-3, weight_decay=0.05, **options)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=2, t_in_epochs=False)
    sparsifier = sparse.create(method, model, target=0.8, total_steps=STEPS, exclude=["head"]).attach(optimizer)
    return model, optimizer, scheduler, sparsifier


@pytest.mark.parametrize(
    ("method", "opt"),
    [("autosparse", opt) for opt in ("sgd", "adamw", "lamb", "lion", "adafactor", "lookahead_adamw")]
    + [("gmp", "lookahead_adamw"), ("rigl", "lookahead_sgd"), ("topk", "lamb")],
)
def test_a_loop_with_layer_decay_and_a_schedule_lands(timm, method, opt):
    model, optimizer, scheduler, sparsifier = made(timm, method, opt, layer_decay=0.75)
    groups = [group["lr"] for group in optimizer.param_groups]
    assert len(groups) > 4
    for step in range(STEPS):
        train(model, optimizer, scheduler, [step])
        layers = sparsifier.layers()
        live = [int((model.get_parameter(f"{layer.name}.weight") != 0).sum()) for layer in layers]
        # A weight that lives may be 0 by chance, and one that has just come back is.
        assert all(used <= layer.live for used, layer in zip(live, layers, strict=True)), step
    assert len(optimizer.param_groups) == len(groups)
    assert sparsifier.steps == STEPS
    sparsifier.finalize()
    weights = [model.get_parameter(f"{layer.name}.weight") for layer in layers]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.8, abs=5e-3)


@pytest.mark.parametrize(
    ("method", "opt"), [("autosparse", "adamw"), ("autosparse", "lookahead_adamw"), ("rigl", "lookahead_adamw")]
)
def test_resume_is_bit_equal(timm, method, opt):
    whole = made(timm, method, opt, layer_decay=0.75)
    train(*whole[:3], range(STEPS // 2))
    state = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole[:3], range(STEPS // 2, STEPS))
    resumed = made(timm, method, opt, layer_decay=0.75)
    for part, loaded in zip(resumed, state, strict=True):
        part.load_state_dict(loaded)
    train(*resumed[:3], range(STEPS // 2, STEPS))
    for (name, a), b in zip(whole[0].named_parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_network_by_its_name(timm):
    model = models.create("timm:resnet18", **models.fitting("timm:resnet18", num_classes=5, in_channels=1))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="unknown model of timm: 'resnet_18'; did you mean 'resnet18'?"):
        models.create("timm:resnet_18")
    with pytest.raises(ValueError, match="timm:resnet18 cannot be called with .*'no_such_option': 1"):
        models.create("timm:resnet18", no_such_option=1)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm:resnet18 needs timm: pip install timm"):
        models.create("timm:resnet18")
