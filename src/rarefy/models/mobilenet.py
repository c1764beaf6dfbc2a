"""MobileNet V1: Howard et al., MobileNets: Efficient Convolutional Neural Networks (arXiv 1704.04861), table 1."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rarefy.models._blocks import conv, initialise

#: Output channels and stride of each depthwise separable block at width 1.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

#: A thinned layer keeps this many channels at least (`min_depth` of the reference implementation, TensorFlow-Slim).
_MIN_CHANNELS = 8


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            depthwise=conv(in_channels, in_channels, 3, stride, groups=in_channels),
            bn1=nn.BatchNorm2d(in_channels),
            relu1=nn.ReLU(inplace=True),
            pointwise=conv(in_channels, out_channels, 1),
            bn2=nn.BatchNorm2d(out_channels),
            relu2=nn.ReLU(inplace=True),
        )
    )


def mobilenet_v1(num_classes: int = 1000, *, width: float = 1.0) -> nn.Sequential:
    """MobileNet V1: (B, 3, 224, 224) -> (B, num_classes); at `width` 1 4,209,088 weights and 568,740,352 MACs.

    `width` multiplies the channels of every layer (the paper's alpha). Raises ValueError unless it is positive.
    """
    if not width > 0:
        raise ValueError(
            f"width must be positive, got {width}; 1.0 is the network of the paper, 0.5 has half its channels"
        )

    def scaled(channels: int) -> int:
        return max(int(channels * width), _MIN_CHANNELS)

    channels = scaled(32)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=conv(3, channels, 3, 2), bn1=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)
    )
    for index, (out_channels, stride) in enumerate(_BLOCKS, start=1):
        layers[f"block{index}"] = _separable(channels, scaled(out_channels), stride)
        channels = scaled(out_channels)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return initialise(nn.Sequential(layers))
