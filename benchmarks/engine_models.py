"""The networks of the benchmark of the engine, and their files in runs/engine: ONNX for the peers, safetensors for us.

A network is NAME-VARIANT: "resnet50-dense", "resnet50-90" (90 % of every layer but the stem pruned by magnitude),
"resnet50-90x4" (in blocks of four input channels), "resnet50-90erk" (spread by ERK), "resnet50-autosparse-0.9" (by
benchmarks/engine_masks.py, trained weights and all).
Depthwise convolutions stay dense. But for the trained ones the weights are random, and the batch normalisations have
random scales and biases, and the statistics that belong to them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarefy import models
from rarefy._files import write_atomically
from rarefy._prices import Prices
from rarefy.sparse import distribution
from rarefy.sparse_files import is_sparse_file, load_sparse

FOLDER = Path(__file__).parents[1] / "runs" / "engine"
SHAPE = (3, 224, 224)


def path(network: str) -> Path:
    """The network's weights."""
    return FOLDER / f"{network}.safetensors"


def build(network: str) -> nn.Module:
    """The finalized network, in evaluation mode; made and stored the first time."""
    name, _, variant = network.partition("-")
    file = path(network)
    if not file.exists():
        if variant.startswith("autosparse"):
            raise FileNotFoundError(f"there is no {file}: run python benchmarks/engine_masks.py")
        state = _made(name, variant).state_dict()
        write_atomically(file, lambda partial: save_file(state, partial))
    model = models.create(name)
    model.load_state_dict(load_sparse(file) if is_sparse_file(file) else load_file(file))
    return model.eval()


def inputs(batch: int) -> Tensor:
    """The pictures that every runtime gets, (batch, 3, 224, 224)."""
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))


def onnx(network: str) -> Path:
    """The network's ONNX file, by the older exporter and opset 13: deepsparse reads no later one."""
    file = FOLDER / f"{network}.onnx"

    def write(partial: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                build(network),
                (torch.zeros(1, *SHAPE),),
                str(partial),
                opset_version=13,
                dynamo=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )

    if not file.exists():
        write_atomically(file, write)
    return file


def onnx_int8(network: str) -> Path:
    """Quantised by onnxruntime: static, per channel, calibrated on random pictures."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(torch.split(inputs(2), 1))

        def get_next(self) -> dict[str, object] | None:
            return {"input": self.left.pop().numpy()} if self.left else None

    file = FOLDER / f"{network}.int8.onnx"
    if not file.exists():
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        write_atomically(
            file,
            lambda partial: quantize_static(
                onnx(network), partial, Pictures(), quant_format=QuantFormat.QDQ, per_channel=True, **types
            ),
        )
    return file


def _made(name: str, variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(name)
    if variant != "dense":
        density = 1 - float(variant.removesuffix("erk").removesuffix("x4")) / 100
        _prune(model, density, "erk" if variant.endswith("erk") else "uniform", 4 if variant.endswith("x4") else 1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the mean of what it sees
    with torch.no_grad():
        model.train()(inputs(4))
    return model


@torch.no_grad()
def _prune(model: nn.Module, density: float, spread: str, block: int) -> None:
    """Keep the largest weights of every layer but the first and depthwise ones, `density` of all of them together.

    They are kept in blocks of so many input channels, by the sum of their sizes.
    """
    layers = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1 and name != "conv1"
    }
    sizes = [weight.numel() for weight in layers.values()]
    relative = distribution.relative_densities(spread, {name: weight.shape for name, weight in layers.items()})
    prices = [Prices.one(1.0, size) for size in sizes]
    kept = distribution.densities(relative, [None] * len(sizes), prices, [0.0] * len(sizes), density * sum(sizes))
    for weight, share in zip(layers.values(), kept, strict=True):
        blocks = weight.abs().reshape(len(weight), -1, block, *weight.shape[2:]).sum(2)
        zeros = blocks.numel() - round(share * blocks.numel())
        if zeros:
            weight[(blocks <= blocks.flatten().kthvalue(zeros).values).repeat_interleave(block, 1)] = 0.0
