"""Networks of the zoo that no package brings: one small network for each kind of work, written in plain PyTorch.

Each follows the structure that made its paper's name, at a size that one thread runs in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, size: int = 3, act: nn.Module | None = None, **options: int) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, batch normalisation, an activation function."""
    padding = size // 2 * options.get("dilation", 1)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act or nn.ReLU())


class Add(nn.Module):
    """x + body(x), the input through ``way`` where the shapes differ."""

    def __init__(self, body: nn.Module, way: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.way, self.act = body, way or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.way(x) + self.body(x))
        return out


class ConvTasNet(nn.Module):
    """Two speakers of one waveform: masks over a learned filter bank, by dilated depthwise blocks."""

    def __init__(self, filters: int = 128, hidden: int = 128) -> None:
        super().__init__()

        def block(dilation: int) -> nn.Module:
            depthwise = nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden)
            first = (nn.Conv1d(filters, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden))
            return Add(
                nn.Sequential(*first, depthwise, nn.PReLU(), nn.GroupNorm(1, hidden), nn.Conv1d(hidden, filters, 1))
            )

        self.encoder = nn.Conv1d(1, filters, 16, 8, bias=False)
        self.masks = nn.Sequential(
            nn.GroupNorm(1, filters),
            nn.Conv1d(filters, filters, 1),
            *(block(2**i) for _ in range(2) for i in range(4)),
            nn.PReLU(),
            nn.Conv1d(filters, 2 * filters, 1),
            nn.Sigmoid(),
        )
        self.decoder = nn.ConvTranspose1d(filters, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        coded = self.encoder(x)
        masks = self.masks(coded).unflatten(1, (2, -1))
        return torch.cat([self.decoder(coded * masks[:, i]) for i in range(2)], 1)


class CRNN(nn.Module):
    """A line of text: convolutions that end one row high, a recurrent layer along the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv_norm(1, 32), nn.MaxPool2d(2), conv_norm(32, 64), nn.MaxPool2d(2)),
            *(conv_norm(64, 128), conv_norm(128, 128), nn.MaxPool2d((2, 1))),
            *(conv_norm(128, 256), nn.MaxPool2d((4, 1))),
        )
        self.recurrent = nn.LSTM(256, 128, batch_first=True, bidirectional=True)
        self.letters = nn.Linear(256, 37)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.letters(self.recurrent(self.features(x).squeeze(2).transpose(1, 2))[0]).log_softmax(-1)
        return out


def cyclegan(width: int = 32) -> nn.Module:
    """The generator of CycleGAN: reflected borders, instance normalisation, transposed convolutions."""

    def layer(conv: nn.Module, channels: int) -> list[nn.Module]:
        return [conv, nn.InstanceNorm2d(channels), nn.ReLU()]

    def plain(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.ReflectionPad2d(size // 2), *layer(nn.Conv2d(inputs, outputs, size), outputs)]

    wide = 4 * width
    blocks = [Add(nn.Sequential(*plain(wide, wide, 3), *plain(wide, wide, 3)[:-1])) for _ in range(6)]
    up = [layer(nn.ConvTranspose2d(c, c // 2, 3, 2, padding=1, output_padding=1), c // 2) for c in (wide, wide // 2)]
    return nn.Sequential(
        *plain(3, width, 7),
        *layer(nn.Conv2d(width, 2 * width, 3, 2, 1), 2 * width),
        *layer(nn.Conv2d(2 * width, wide, 3, 2, 1), wide),
        *blocks,
        *up[0],
        *up[1],
        *(nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()),
    )


def dcgan(width: int = 48) -> nn.Module:
    """The generator of DCGAN: transposed convolutions from 100 numbers to 64x64."""
    sizes = (100, 8 * width, 4 * width, 2 * width, width)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        stride, padding = (2, 1) if i else (1, 0)
        layers += [
            nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


class DeepLab(nn.Module):
    """Segmentation: a backbone with dilation, a pyramid of dilated convolutions and the mean of the picture."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
            last = conv_norm(outputs, outputs, dilation=dilation, act=nn.Identity())
            way = conv_norm(inputs, outputs, 1, nn.Identity(), stride=stride) if inputs != outputs else None
            return Add(nn.Sequential(conv_norm(inputs, outputs, stride=stride), last), way, nn.ReLU())

        stem = (conv_norm(3, 32, 7, stride=2), nn.MaxPool2d(3, 2, 1))
        deep = (block(32, 64), block(64, 128, 2), block(128, 256, dilation=2), block(256, 256, dilation=4))
        self.backbone = nn.Sequential(*stem, *deep)
        self.pyramid = nn.ModuleList(
            [conv_norm(256, 64, 1), *(conv_norm(256, 64, dilation=rate) for rate in (6, 12, 18))]
        )
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(256, 64, 1), nn.ReLU())
        self.head = nn.Sequential(conv_norm(5 * 64, 64, 1), conv_norm(64, 64), nn.Conv2d(64, 21, 1))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.backbone(x)
        mean = self.mean(deep).expand(-1, -1, *deep.shape[2:])
        found = self.head(torch.cat([*(part(deep) for part in self.pyramid), mean], 1))
        return F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)


class EDSR(nn.Module):
    """Super resolution without normalisation."""

    def __init__(self, width: int = 64, blocks: int = 8) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1)

        body = [Add(nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width))) for _ in range(blocks)]
        self.body = nn.Sequential(conv(3, width), Add(nn.Sequential(*body, conv(width, width))))
        self.up = nn.Sequential(conv(width, 4 * width), nn.PixelShuffle(2), conv(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.body(x))
        return out


def espcn() -> nn.Module:
    """Super resolution with one shuffle of channels at the end."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(64, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3)),
    )


class Pyramid(nn.Module):
    """A detector with a feature pyramid: heads shared by three levels, nearest upsampling between them."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (32, 64, 128, 256)
        self.stem = nn.Sequential(conv_norm(3, 32, stride=2), conv_norm(32, 32))
        pairs = list(pairwise(sizes))
        self.levels = nn.ModuleList(nn.Sequential(conv_norm(i, o, stride=2), conv_norm(o, o)) for i, o in pairs)
        self.across = nn.ModuleList(nn.Conv2d(size, width, 1) for size in sizes[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in sizes[1:])
        self.classes = nn.Sequential(conv_norm(width, width), nn.Conv2d(width, 3 * 20, 1))
        self.boxes = nn.Sequential(conv_norm(width, width), nn.Conv2d(width, 3 * 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, features = self.stem(x), []
        for level, across in zip(self.levels, self.across, strict=True):
            x = level(x)
            features.append(across(x))
        for i in (1, 0):
            features[i] = features[i] + F.interpolate(features[i + 1], scale_factor=2.0, mode="nearest")
        smooth = [layer(feature) for layer, feature in zip(self.smooth, features, strict=True)]
        classes = torch.cat([self.classes(feature).flatten(2) for feature in smooth], 2)
        return classes, torch.cat([self.boxes(feature).flatten(2) for feature in smooth], 2)


class SpeechGRU(nn.Module):
    """Deep Speech: convolutions over the spectrogram, recurrent layers along time."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, (21, 11), 2, (10, 5)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20)),
            *(nn.Conv2d(32, 32, (11, 11), (2, 1), (5, 5)), nn.BatchNorm2d(32), nn.Hardtanh(0, 20)),
        )
        self.recurrent = nn.GRU(640, 128, 2, batch_first=True, bidirectional=True)
        self.letters = nn.Linear(256, 29)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).flatten(1, 2).transpose(1, 2)
        out: Tensor = self.letters(self.recurrent(columns)[0])
        return out


class LSTMTagger(nn.Module):
    """A tag for every word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, 64)
        self.recurrent = nn.LSTM(64, 64, batch_first=True, bidirectional=True)
        self.hidden, self.tags = nn.Linear(128, 64), nn.Linear(64, 17)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tags(self.hidden(self.recurrent(self.words(x))[0]).tanh())
        return out


def m5() -> nn.Module:
    """Keywords in raw sound, by one-dimensional convolutions."""

    def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv1d(inputs, outputs, size, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]

    layers = [*layer(1, 32, 80, 16), *layer(32, 32, 3), *layer(32, 64, 3), *layer(64, 64, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 35))


class NCF(nn.Module):
    """Recommendations: embeddings of a user, of ten bought items and of 13 numbers, a small tower."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(1000, width), nn.EmbeddingBag(2000, width, mode="mean")
        self.numbers = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        self.tower = nn.Sequential(nn.Linear(3 * width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.score = nn.Linear(32 + width, 1)

    def forward(self, user: Tensor, items: Tensor, numbers: Tensor) -> Tensor:
        u, i, n = self.users(user), self.items(items), self.numbers(numbers)
        out: Tensor = self.score(torch.cat([self.tower(torch.cat([u, i, n], 1)), u * i], 1)).sigmoid()
        return out


class TimeTransformer(nn.Module):
    """PyTorch's own encoder over frames of 40 features."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first, self.places = nn.Linear(40, width), nn.Parameter(0.1 * torch.randn(1, 64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 256, batch_first=True, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.encoder(self.first(x) + self.places).mean(1))
        return out


class PointNet(nn.Module):
    """Clouds of points, turned by a matrix that a network of its own finds."""

    def __init__(self) -> None:
        super().__init__()

        def points(*sizes: int) -> nn.Sequential:
            pairs = pairwise(sizes)
            return nn.Sequential(*(m for i, o in pairs for m in (nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU())))

        def whole(*sizes: int) -> nn.Sequential:
            pairs = pairwise(sizes[:-1])
            hidden = (m for i, o in pairs for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()))
            return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))

        self.look, self.turn = points(3, 64, 128, 256), whole(256, 128, 9)
        self.features, self.classes = points(3, 64, 64, 128, 512), whole(512, 256, 128, 40)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(self.look(x).max(2).values).unflatten(1, (3, 3)) + torch.eye(3, dtype=x.dtype)
        out: Tensor = self.classes(self.features(turn @ x).max(2).values)
        return out


def quartznet(width: int = 128) -> nn.Module:
    """Speech by one-dimensional convolutions, depthwise ones and pointwise ones in turn."""

    def separable(size: int) -> list[nn.Module]:
        depthwise = nn.Conv1d(width, width, size, padding=size // 2, groups=width, bias=False)
        return [depthwise, nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU()]

    def block(size: int) -> nn.Module:
        way = nn.Sequential(nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width))
        return Add(
            nn.Sequential(*(m for _ in range(3) for m in separable(size)), *separable(size)[:-1]), way, nn.ReLU()
        )

    first = (nn.Conv1d(64, width, 33, 2, 16, bias=False), nn.BatchNorm1d(width), nn.ReLU())
    return nn.Sequential(*first, *(block(size) for size in (33, 39, 51)), nn.Conv1d(width, 29, 1), nn.LogSoftmax(1))


def r3d() -> nn.Module:
    """Video by three-dimensional convolutions."""

    def layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs)]

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        way = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))
        body = nn.Sequential(*layer(inputs, outputs, stride), nn.ReLU(), *layer(outputs, outputs))
        return Add(body, way if stride > 1 else None, nn.ReLU())

    stem = (nn.Conv3d(3, 32, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(32), nn.ReLU())
    blocks = (block(32, 32, 1), block(32, 64, 2), block(64, 128, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, 50))


class Shuffle(nn.Module):
    """A block of ShuffleNetV2: half of the channels pass, then both halves are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.split = inputs // 2 if stride == 1 else 0
        own = half if stride == 1 else inputs

        def down(channels: int) -> nn.Module:
            return conv_norm(channels, channels, act=nn.Identity(), stride=stride, groups=channels)

        self.left = nn.Sequential(down(inputs), conv_norm(inputs, half, 1)) if stride > 1 else nn.Identity()
        self.right = nn.Sequential(conv_norm(own, half, 1), down(half), conv_norm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.split else (x, x)
        both = torch.cat([self.left(left), self.right(right)], 1)
        split = both.view(both.shape[0], 2, -1, *both.shape[2:])
        return split.transpose(1, 2).flatten(1, 2)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2 at width 1."""
    layers: list[nn.Module] = [conv_norm(3, 24, stride=2), nn.MaxPool2d(3, 2, 1)]
    sizes = (24, 116, 232, 464)
    for inputs, outputs, count in zip(sizes, sizes[1:], (4, 8, 4), strict=False):
        layers += [Shuffle(inputs, outputs, 2), *(Shuffle(outputs, outputs, 1) for _ in range(count - 1))]
    return nn.Sequential(*layers, conv_norm(464, 1024, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class Siamese(nn.Module):
    """How alike two pictures are, by one network that sees both."""

    def __init__(self) -> None:
        super().__init__()
        layers = (m for i, o in ((1, 64), (64, 128), (128, 128)) for m in (conv_norm(i, o), nn.MaxPool2d(2)))
        self.tower = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 64, 128))
        self.last = nn.Linear(128, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.last((self.tower(a) - self.tower(b)).abs()).sigmoid()
        return out


class Fire(nn.Module):
    """A block of SqueezeNet: few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, few, 1)
        self.one, self.three = nn.Conv2d(few, many, 1), nn.Conv2d(few, many, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.one(x).relu(), self.three(x).relu()], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()),
        *(Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)),
        *(Fire(384, 64, 256), Fire(512, 64, 256), nn.Conv2d(512, 1000, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def tab_mlp() -> nn.Module:
    """A table's row through residual layers."""
    blocks = [Add(nn.Sequential(nn.BatchNorm1d(128), nn.Linear(128, 128), nn.SiLU())) for _ in range(4)]
    return nn.Sequential(nn.Linear(64, 128), *blocks, nn.Linear(128, 16))


class Causal(nn.Conv1d):
    """A convolution that sees no later time."""

    def __init__(self, inputs: int, outputs: int, size: int, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, size, dilation=dilation, padding=(size - 1) * dilation)
        self.later = (size - 1) * dilation

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : -self.later]


def tcn(width: int = 64) -> nn.Module:
    """A temporal convolutional network: causal convolutions with doubling dilation, weights normalised."""

    def block(inputs: int, dilation: int) -> nn.Module:
        def conv(channels: int) -> nn.Module:
            made: nn.Module = nn.utils.parametrizations.weight_norm(Causal(channels, width, 3, dilation))
            return made

        way = None if inputs == width else nn.Conv1d(inputs, width, 1)
        return Add(nn.Sequential(conv(inputs), nn.ReLU(), conv(width), nn.ReLU()), way, nn.ReLU())

    return nn.Sequential(block(8, 1), *(block(width, 2**i) for i in range(1, 5)), nn.Conv1d(width, 8, 1))


class UNet(nn.Module):
    """Segmentation with ways across, upsampled by transposed convolutions or bilinearly."""

    def __init__(self, bilinear: bool = False, sizes: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(conv_norm(inputs, outputs), conv_norm(outputs, outputs))

        def up(inputs: int, outputs: int) -> nn.Module:
            if not bilinear:
                return nn.ConvTranspose2d(inputs, outputs, 2, 2)
            return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))

        pairs = list(pairwise(sizes))
        self.first = double(3, sizes[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), double(i, o)) for i, o in pairs)
        self.up = nn.ModuleList(up(o, i) for i, o in reversed(pairs))
        self.join = nn.ModuleList(double(2 * i, i) for i, _ in reversed(pairs))
        self.last = nn.Conv2d(sizes[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(kept[-1]))
        x = kept.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        out: Tensor = self.last(x)
        return out


class VAE(nn.Module):
    """A variational autoencoder, at its mean."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 32, 64, 128)
        pairs = list(pairwise(sizes))
        self.encoder = nn.Sequential(*(conv_norm(i, o, act=nn.LeakyReLU(), stride=2) for i, o in pairs), nn.Flatten())
        self.mean, self.spread = nn.Linear(128 * 64, 64), nn.Linear(128 * 64, 64)
        self.first = nn.Sequential(nn.Linear(64, 128 * 64), nn.Unflatten(1, (128, 8, 8)))
        up = [(nn.ConvTranspose2d(o, i, 4, 2, 1), nn.ReLU()) for i, o in reversed(pairs)]
        self.decoder = nn.Sequential(*[m for pair in up for m in pair][:-1], nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coded = self.encoder(x)
        mean, spread = self.mean(coded), self.spread(coded)
        return self.decoder(self.first(mean)), mean, spread


class WaveNet(nn.Module):
    """Sound: gates over causal dilated convolutions, whose skips are summed."""

    def __init__(self, width: int = 64, layers: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.filters = nn.ModuleList(Causal(width, width, 2, 2 ** (i % 5)) for i in range(layers))
        self.gates = nn.ModuleList(Causal(width, width, 2, 2 ** (i % 5)) for i in range(layers))
        self.through = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for filters, gate, through, skip in zip(self.filters, self.gates, self.through, self.skips, strict=True):
            inner = filters(x).tanh() * gate(x).sigmoid()
            total = total + skip(inner)
            x = x + through(inner)
        out: Tensor = self.last(total)
        return out


class Stages(nn.Module):
    """A block of YOLO (C2f): every bottleneck's output is kept and all are joined."""

    def __init__(self, inputs: int, outputs: int, count: int, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.first = conv_norm(inputs, outputs, 1, nn.SiLU())
        bodies = (
            nn.Sequential(conv_norm(half, half, 3, nn.SiLU()), conv_norm(half, half, 3, nn.SiLU()))
            for _ in range(count)
        )
        self.blocks = nn.ModuleList(Add(body) if shortcut else body for body in bodies)
        self.last = conv_norm((2 + count) * half, outputs, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        out: Tensor = self.last(torch.cat(parts, 1))
        return out


class YOLO(nn.Module):
    """A detector in the manner of YOLOv8: pools in a row, a pyramid up and down, heads on three levels."""

    def __init__(self) -> None:
        super().__init__()
        silu = nn.SiLU()
        self.first = nn.Sequential(
            *(conv_norm(3, 16, 3, silu, stride=2), conv_norm(16, 32, 3, silu, stride=2), Stages(32, 32, 1)),
            *(conv_norm(32, 64, 3, silu, stride=2), Stages(64, 64, 2)),
        )
        self.second = nn.Sequential(conv_norm(64, 128, 3, silu, stride=2), Stages(128, 128, 2))
        self.third = nn.Sequential(conv_norm(128, 256, 3, silu, stride=2), Stages(256, 256, 1))
        self.before, self.pool, self.after = (
            conv_norm(256, 128, 1, silu),
            nn.MaxPool2d(5, 1, 2),
            conv_norm(512, 256, 1, silu),
        )
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.join_second, self.join_first = Stages(384, 128, 1, False), Stages(192, 64, 1, False)
        self.down_first, self.down_second = conv_norm(64, 64, 3, silu, stride=2), conv_norm(128, 128, 3, silu, stride=2)
        self.low_second, self.low_third = Stages(192, 128, 1, False), Stages(384, 256, 1, False)
        sizes = (64, 128, 256)
        self.heads = nn.ModuleList(nn.Sequential(conv_norm(c, 64, 3, silu), nn.Conv2d(64, 64 + 20, 1)) for c in sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        second = self.second(first)
        pooled = [self.before(self.third(second))]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        third = self.after(torch.cat(pooled, 1))
        second = self.join_second(torch.cat([self.up(third), second], 1))
        first = self.join_first(torch.cat([self.up(second), first], 1))
        second = self.low_second(torch.cat([self.down_first(first), second], 1))
        third = self.low_third(torch.cat([self.down_second(second), third], 1))
        levels = zip(self.heads, (first, second, third), strict=True)
        found = torch.cat([head(level).flatten(2) for head, level in levels], 2)
        boxes, classes = found[:, :64], found[:, 64:]
        places = torch.arange(16, dtype=x.dtype)
        sides = (boxes.reshape(boxes.shape[0], 4, 16, -1).softmax(2) * places[:, None]).sum(2)
        return sides, classes.sigmoid()
