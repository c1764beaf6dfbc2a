"""Whole networks, small and sparse."""

import torch
import torch.nn.functional as F
from torch import nn

from rarefy import models
from tests.engine.layers import sparse


def thinned(model: nn.Module, density: float = 0.15) -> nn.Module:
    """The model in evaluation mode with sparse weights, its normalisations as if they had seen something."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.weight.data = sparse(module.weight.data, density)
        if isinstance(module, nn.RNNBase):
            for weight in (each for each in module.parameters() if each.dim() == 2):
                weight.data = sparse(weight.data, density)
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


class UNet(nn.Module):
    """Down, up, and concatenations across."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, stride=2, padding=1)
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(20, 24, 3, padding=1), nn.BatchNorm2d(24), nn.SiLU())
        self.up, self.out = nn.Conv2d(44, 16, 3, padding=1), nn.Conv2d(28, 2, 1)

    def forward(self, x):
        a = F.relu(self.stem(x))
        b = F.relu6(self.down(a))
        c = F.interpolate(self.deep(b), scale_factor=2)
        d = F.gelu(self.up(torch.cat([c, b], 1)))
        return torch.sigmoid(self.out(torch.cat([F.interpolate(d, scale_factor=2.0), a], 1)))


class Vision(nn.Module):
    """A patch embedding, a transformer block, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, 40, activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.block(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class Signal(nn.Module):
    """One-dimensional convolutions with a squeeze-and-excitation gate, and two results."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 5, padding=2), nn.Conv1d(12, 12, 3, padding=2, dilation=2)
        self.squeeze, self.excite = nn.Conv1d(12, 4, 1), nn.Conv1d(4, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.hardswish(self.a(x))
        y = F.avg_pool1d(torch.tanh(self.b(x)) + x, 2)
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool1d(y, 1)))))
        y = y * gate
        return self.head(y.mean(2)), y.softmax(1)


#: name: (a function that makes the model, the shape of one sample)
NETWORKS = {
    "resnet20": (models.resnet20, (3, 16, 16)),
    "resnet50": (lambda: models.resnet50(num_classes=10), (3, 32, 32)),
    "mobilenet_v1": (lambda: models.mobilenet_v1(num_classes=10, width=0.25), (3, 32, 32)),
    "unet": (UNet, (3, 16, 24)),
    "vision": (Vision, (3, 16, 16)),
    "signal": (Signal, (3, 30)),
}
