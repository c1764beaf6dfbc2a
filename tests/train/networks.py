"""Networks that recipes of tests name as module:function."""

import torch
from torch import Tensor, nn


def small(num_classes: int = 10, *, width: int = 8) -> nn.Module:
    """(B, 3, H, W) -> (B, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def any_options(**given: int) -> nn.Module:
    """Take whatever is given."""
    return small(**given)


def two_classes() -> nn.Module:
    """Know its own classes."""
    return small(2)


def no_module(num_classes: int = 10) -> int:
    """Return something else."""
    return num_classes


class Wrapped(nn.Module):
    """Gives a dict of outputs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = small(num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


not_callable = torch.zeros(1)
