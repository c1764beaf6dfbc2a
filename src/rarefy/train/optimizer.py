"""The optimizer of a recipe, and its learning rate over the run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from rarefy.train.recipe import Optimizer


def learning_rate(step: float, warmup: float, total: float) -> float:
    """Factor on the learning rate: linear from 0 over ``warmup`` steps, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2.0


def make_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of all parameters; each of its groups keeps the learning rate given to it as ``peak_lr``.

    The groups are the weights, and the vectors: the scales and biases of norms and the biases of convolutions, with a
    weight decay of their own.
    """
    linear_biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.Linear)}
    vectors = [p for p in model.parameters() if p.dim() <= 1 and id(p) not in linear_biases]
    chosen = {id(p) for p in vectors}
    weights = [p for p in model.parameters() if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": options.lr, "weight_decay": options.weight_decay, "peak_lr": options.lr},
        {"params": vectors, "lr": options.lr, "weight_decay": options.norm_weight_decay, "peak_lr": options.lr},
    ]
    if options.name == "adamw":
        # on a CPU it goes over each parameter seven times unless it is asked to go once
        fused = True if all(p.device.type == "cpu" for p in model.parameters()) else None
        return torch.optim.AdamW(groups, lr=options.lr, fused=fused)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)
