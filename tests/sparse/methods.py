"""Every method and policy under one name, and a task that trains in a second: new methods join the tests here."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from rarefy.latency import Latency, LayerLatency

STEPS = 200

#: name of the case -> (name of the method, its options)
CASES = {
    "autosparse": ("autosparse", {}),
    "autosparse-channel": ("autosparse", {"granularity": "channel", "steps_per_epoch": 20, "cutoff": 0.5}),
    "autosparse-accuracy": ("autosparse", {"target": 0.9}),
    "autosparse-cost": ("autosparse", {"target": 0.9, "policy": "cost"}),
    "autosparse-flops": ("autosparse", {"target_flops": 0.2}),
    "autosparse-ms": ("autosparse", {"target_ms": 1.5}),
    "autosparse-sparse-backward": ("autosparse", {"target": 0.8, "backward_density": 0.5}),
    "autosparse-block": ("autosparse", {"target": 0.8, "block": (2, 4), "exclude": ["0"]}),
    "nm": ("nm", {"n": 1, "m": 4, "exclude": ["0"]}),
    "str": ("str", {}),
    "str-target": ("str", {"target": 0.9}),
    "static": ("static", {"target": 0.9, "distribution": "uniform"}),
    "gmp": ("gmp", {"target": 0.9}),
    "gmp-flops": ("gmp", {"target_flops": 0.2, "distribution": "erk"}),
    "gmp-ms": ("gmp", {"target_ms": 1.5, "distribution": "global"}),
    "set": ("set", {"target": 0.9}),
    "set-block": ("set", {"target": 0.8, "block": (2, 4), "exclude": ["0"]}),
    "rigl": ("rigl", {"target": 0.9}),
    "snfs": ("snfs", {"target": 0.9}),
    "mest": ("mest", {"target": 0.9, "gradient_weight": 0.1}),
    "mest-soft": ("mest", {"target": 0.9, "soft": True}),
    "granet": ("granet", {"target": 0.9}),
    "acdc": ("acdc", {"target": 0.9, "phase": 0.1}),
    "st3": ("st3", {"target": 0.9, "rescale": False}),
    "st3-sigma": ("st3", {"target": 0.7, "sigma": True}),
    "band": ("band", {"target": 0.9}),
    "feather": ("feather", {"target": 0.9, "theta": 0.5}),
    "topk": ("topk", {"target": 0.8}),
    "powerprop": ("powerprop", {"target": 0.9}),
    "topkast": ("topkast", {"target": 0.9}),
    "optg": ("optg", {"target": 0.9}),
    "dst": ("dst", {"target": 0.9}),
    "dst-free": ("dst", {}),
    "ltp": ("ltp", {"target": 0.9}),
    "cs": ("cs", {"target": 0.9}),
    "topkast-power": ("topkast", {"target": 0.9, "power": 1.5, "superset": 4.0}),
}
#: Cases whose masks are soft up to the last step: only what is 0 then is what they call masked.
SOFT = {"ltp", "cs"}

#: One of each family, where all that matters is that the model is a plain one.
FAMILIES = ["autosparse-accuracy", "rigl", "topk", "cs"]

#: Every case as a parameter of tests; make test-fast runs one of each family.
EVERY = [pytest.param(case, marks=() if case in FAMILIES else pytest.mark.slow) for case in CASES]

TARGETED = {name: case for name, case in CASES.items() if {"target", "target_flops", "target_ms"} & set(case[1])}


def network(norm: bool = True) -> nn.Sequential:
    """(B, 2, 8, 8) -> (B, 4), with every kind of layer that can be sparsified in an image network."""
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(56, 4),
    )


def latency(block: tuple[int, int] = (1, 1)) -> Latency:
    """What a :func:`network` might take, in all 3 ms: layers that level off, one that bends, one of no matter."""
    milliseconds = {
        "0": (288, (0.1, 0.15, 0.3, 0.3)),
        "3": (1152, (0.1, 0.3, 1.5, 1.5)),
        "6": (384, (0.05, 0.2, 0.35, 0.7)),
        "8": (224, (0.2, 0.2, 0.2, 0.2)),
    }
    layers = [
        LayerLatency(name, weights, (0.0, 0.1, 0.6, 1.0), tuple(each / 1000 for each in seconds))
        for name, (weights, seconds) in milliseconds.items()
    ]
    return Latency(tuple(layers), 0.0003, "float32", block, {"cpu": "none"})


@functools.cache
def batch(step: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that is a pure function of the step: the class is the quadrant with a bright patch."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (size,), generator=generator)
    images = torch.randn(size, 2, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return images, labels


def create(case: str, model: nn.Module, total_steps: int = STEPS, **options) -> sparse.Sparsifier:
    """The sparsifier of a case, on a :func:`network`."""
    name, known = CASES[case]
    if "target_flops" in {**known, **options}:
        options = {"example_input": torch.zeros(1, 2, 8, 8, device=next(model.parameters()).device), **options}
    if "target_ms" in {**known, **options}:
        options = {"latency": latency(), **options}
    return sparse.create(name, model, total_steps=total_steps, **{**known, **options})


def assert_equal(a, b, about=""):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_equal(a[key], b[key], f"{about} {key}")
        elif isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), f"{about} {key}"
        else:
            assert a[key] == b[key], f"{about} {key}"


class Run:
    """A model, its sparsifier and its optimizer."""

    def __init__(
        self,
        case: str,
        *,
        total_steps: int = STEPS,
        norm: bool = True,
        adam: bool = False,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        **options,
    ) -> None:
        torch.manual_seed(1)
        self.plain = network(norm).to(device)
        self.device = device
        self.sparsifier = create(case, self.plain, total_steps, **options)
        self.model = wrap(self.plain)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.plain.parameters(), lr=3e-3)
            if adam
            else torch.optim.SGD(self.plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        )
        self.sparsifier.attach(self.optimizer)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`batch` on this run's device."""
        images, labels = batch(step)
        return images.to(self.device), labels.to(self.device)

    def train(self, steps: int) -> "Run":
        """Go on for so many steps."""
        self.model.train()
        for _ in range(steps):
            images, labels = self.batch(self.sparsifier.steps)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
        return self

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
        }

    def load(self, state: dict) -> "Run":
        """Take a checkpoint back."""
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        return self


def accuracy(model: nn.Module) -> float:
    """On images that no training step saw."""
    model.eval()
    images, labels = batch(10_000, 500)
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()
