from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy import models


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "classes", "size"),
    [
        (models.fashion_cnn(), (1, 28, 28), 10, 135_312 + 2 * 304 + 10),
        (models.resnet20(), (3, 32, 32), 10, 272_474),
        (models.resnet20(in_channels=1), (1, 28, 28), 10, 272_186),
        (models.resnet20(7, width=8, stem_stride=2), (3, 32, 32), 7, 67_672 + 2 * 392 + 231),
        (models.resnet18(), (3, 64, 64), 1000, 11_689_512),
        (models.resnet50(12), (3, 64, 64), 12, 25_557_032 - 2049 * 988),
        (models.mobilenet_v1(), (3, 64, 64), 1000, 4_231_976),
        (models.mobilenet_v1(5, width=0.1), (3, 64, 64), 5, 35_813 + 2 * 1098 + 515),
    ],
)
def test_shapes_and_sizes(model: nn.Module, shape: tuple[int, ...], classes: int, size: int) -> None:
    assert parameters(model) == size
    assert model(torch.zeros(2, *shape)).shape == (2, classes)


def test_resnet50_has_the_names_and_shapes_of_torchvision() -> None:
    state = models.resnet50().state_dict()
    convolutions = json.loads((Path(__file__).parent / "data_files" / "resnet50_budgets.json").read_text())["layers"]
    expected = []
    for layer in convolutions:
        name = layer["name"]
        expected.append(f"{name}.weight")
        if name == "fc":
            expected.append("fc.bias")
            continue
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        expected += [
            f"{norm}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]
    assert list(state) == expected
    assert len(state) == 320
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer3.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert state["layer4.2.bn3.running_var"].shape == (2048,)
    assert state["fc.weight"].shape == (1000, 2048)


def test_resnet18_has_the_names_of_torchvision() -> None:
    state = models.resnet18().state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = ["conv1.weight", *(f"bn1.{key}" for key in norm)]
    for stage in range(1, 5):
        for block in range(2):
            place = f"layer{stage}.{block}"
            for number in (1, 2):
                expected += [f"{place}.conv{number}.weight", *(f"{place}.bn{number}.{key}" for key in norm)]
            if stage > 1 and block == 0:
                expected += [f"{place}.downsample.0.weight", *(f"{place}.downsample.1.{key}" for key in norm)]
    assert list(state) == [*expected, "fc.weight", "fc.bias"]
    assert len(state) == 122
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)


def test_resnet50_strides_in_the_3x3_convolution() -> None:
    strides = {
        name: module.stride[0]
        for name, module in models.resnet50().named_modules()
        if isinstance(module, nn.Conv2d) and module.stride[0] != 1
    }
    assert strides == {
        "conv1": 2,
        **{f"layer{stage}.0.{conv}": 2 for stage in (2, 3, 4) for conv in ("conv2", "downsample.0")},
    }


@pytest.mark.parametrize("name", models.names())
def test_weights_are_kaiming_normal_by_fan_in(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            expected = math.sqrt((2 if isinstance(module, nn.Conv2d) else 1) / fan_in)
            # Five standard errors of the estimate, with the seed fixed.
            error = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=error)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", models.names())
def test_gradients_reach_every_parameter(name: str) -> None:
    model = models.create(name)
    model(torch.randn(2, 1 if name == "fashion_cnn" else 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_create_passes_its_options_on() -> None:
    model = models.create("resnet20", num_classes=3, width=4, in_channels=1, stem_stride=2)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    assert models.names() == ("fashion_cnn", "mobilenet_v1", "resnet18", "resnet20", "resnet50")


def test_networks_of_others_by_name() -> None:
    assert models.options("tests.train.networks:small") == ("num_classes", "width")
    assert models.options("tests.train.networks:any_options") == ("**",)
    given = {"num_classes": 7, "in_channels": 3}
    assert models.fitting("resnet20", **given) == given
    assert models.fitting("resnet50", **given) == models.fitting("tests.train.networks:small", **given)
    assert models.fitting("tests.train.networks:any_options", **given) == {"num_classes": 7}
    assert models.fitting("tests.train.networks:two_classes", **given) == {}
    assert models.fitting("timm:resnet18", **given) == {"num_classes": 7, "in_chans": 3}
    model = models.create("tests.train.networks:small", num_classes=5, width=4)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    assert models.is_reference("timm:resnet18")
    assert not models.is_reference("resnet18")


def test_errors_name_the_nearest_right_one() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet_20'; did you mean 'resnet20'\? .there is fashion_cnn"):
        models.create("resnet_20")
    with pytest.raises(ValueError, match=r"unknown option of model 'resnet20': 'widht'; did you mean 'width'\?"):
        models.create("resnet20", widht=8)
    with pytest.raises(ValueError, match=r"unknown option of model 'fashion_cnn': 'width' .there is num_cl"):
        models.create("fashion_cnn", width=8)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        models.create("mobilenet_v1", width=0)


@pytest.mark.parametrize(
    ("name", "width", "why"),
    [
        ("resnet20", -1, r"Trying to create tensor with negative dimension -1: .*"),
        ("resnet20", 10**20, r".*Overflow when unpacking .*"),
        ("resnet20", "x", r".*"),
        ("mobilenet_v1", math.inf, r"cannot convert float infinity to integer"),
        ("mobilenet_v1", math.nan, r"width must be positive, got nan; .*"),
    ],
)
def test_values_that_make_no_network_are_named_in_a_line(name: str, width: object, why: str) -> None:
    with pytest.raises(ValueError, match="cannot be called") as caught:
        models.create(name, width=width)
    assert re.fullmatch(rf"{name} cannot be called with {{'width': {width!r}}}: {why}", str(caught.value))


def test_long_values_are_cut_short() -> None:
    with pytest.raises(ValueError, match="cannot be called") as caught:
        models.create("resnet20", width=10**400)
    assert len(str(caught.value)) < 500
