"""Residual networks: ResNet-20 for small images, ResNet-18 and ResNet-50 v1.5 for ImageNet.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (CVPR 2016, arXiv 1512.03385). Wherever the
shape changes the shortcut is a 1x1 convolution (the paper's option B): then every layer of these networks is a
convolution, a normalisation, a ReLU, a pool or a linear layer. Parameter names are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from rarefy.models._blocks import conv, initialise


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions of `width` channels, the stride in the first: (B, in_channels, H, W) -> (B, width, h, w)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3, 1x1 to 4 `width`; with the stride in the 3x3, which is what makes it v1.5."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + shortcut)  # type: ignore[no-any-return]


def _resnet(
    stem: dict[str, nn.Module], block: type[BasicBlock | Bottleneck], depths: Sequence[int], width: int, classes: int
) -> nn.Sequential:
    """The stem, then stages of `depths` blocks, each after the first at half the resolution and twice the width."""
    layers = OrderedDict(stem)
    channels = width
    for stage, depth in enumerate(depths):
        stage_width = width << stage
        blocks = []
        for index in range(depth):
            blocks.append(block(channels, stage_width, stride=2 if stage > 0 and index == 0 else 1))
            channels = stage_width * block.expansion
        layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, classes)
    return initialise(nn.Sequential(layers))


def _large_stem() -> dict[str, nn.Module]:
    """Make what comes before the stages in networks for ImageNet: a quarter of the resolution, 64 channels."""
    return {
        "conv1": conv(3, 64, 7, 2),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, 2, padding=1),
    }


def resnet20(num_classes: int = 10, *, width: int = 16, in_channels: int = 3, stem_stride: int = 1) -> nn.Sequential:
    """ResNet-20 for small images (section 4.2 of the paper): (B, in_channels, H, W) -> (B, num_classes).

    Three stages of three basic blocks with `width`, 2 `width` and 4 `width` channels. A `stem_stride` of 2 halves the
    resolution of every layer after the stem and so makes the network about four times cheaper.
    """
    stem: dict[str, nn.Module] = {
        "conv1": conv(in_channels, width, 3, stem_stride),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
    }
    return _resnet(stem, BasicBlock, (3, 3, 3), width, num_classes)


def resnet18(num_classes: int = 1000) -> nn.Sequential:
    """ResNet-18: (B, 3, 224, 224) -> (B, num_classes); 11,678,912 weights (11,689,512 parameters).

    1,814,073,344 MACs. Its `state_dict` has torchvision's names and shapes.
    """
    return _resnet(_large_stem(), BasicBlock, (2, 2, 2, 2), 64, num_classes)


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """ResNet-50 v1.5: (B, 3, 224, 224) -> (B, num_classes).

    25,502,912 weights (25,557,032 parameters) and 4,089,184,256 MACs. Its `state_dict` has torchvision's names and
    shapes, so that torchvision's checkpoints load.
    """
    return _resnet(_large_stem(), Bottleneck, (3, 4, 6, 3), 64, num_classes)
