"""The networks of the benchmark of the engine, and their files in runs/engine: ONNX for the peers, safetensors for us.

A network is NAME-VARIANT: "resnet50-dense", "resnet50-90" (90 % of every layer but the stem pruned by magnitude),
"resnet50-90x4" (in blocks of four input channels), "resnet50-90erk" (spread by ERK), "resnet50-autosparse-0.9" (by
benchmarks/engine_masks.py, trained weights and all). "bert" is BERT-base's encoder on 128 embedded tokens, "linear" six
layers of 4096 x 4096, more than a cache holds; more of other kinds are in engine_networks.py.
Depthwise convolutions stay dense. But for the trained ones the weights are random, and the batch normalisations have
random scales and biases, and the statistics that belong to them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine_networks import NETWORKS
from rarefy import models
from rarefy._files import write_atomically
from rarefy._prices import Prices
from rarefy.sparse import distribution
from rarefy.sparse_files import is_sparse_file, load_sparse

FOLDER = Path(__file__).parents[1] / "runs" / "engine"
SHAPES = {
    "bert": (128, 768),
    "linear": (4096,),
    **{name: each.shape for name, each in NETWORKS.items()},
}  # of an input; of the others a picture's
PICTURE = (3, 224, 224)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GRU)


class Attention(nn.Module):
    """Self-attention with 12 heads: (batch, tokens, 768) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(768, 768) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, 12, width // 12).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """A layer of BERT-base: (batch, tokens, 768) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(), nn.LayerNorm(768)
        self.up, self.down, self.norm2 = nn.Linear(768, 3072), nn.Linear(3072, 768), nn.LayerNorm(768)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and the two layers behind it, each with its residual and normalisation."""
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


def _create(name: str) -> nn.Module:
    match name:
        case "bert":
            return nn.Sequential(*(EncoderLayer() for _ in range(12)))
        case "linear":
            return nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(6)))
    return NETWORKS[name].make() if name in NETWORKS else models.create(name)


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
    model = _create(name)
    model.load_state_dict(load_sparse(file) if is_sparse_file(file) else load_file(file))
    return model.eval()


def shape(network: str) -> tuple[int, ...]:
    """Of one example."""
    return SHAPES.get(network.partition("-")[0], PICTURE)


def inputs(batch: int, network: str = "") -> Tensor:
    """What every runtime gets, random: pictures, (batch, 3, 224, 224), or what the network takes."""
    return torch.randn(batch, *shape(network), generator=torch.Generator().manual_seed(1))


def onnx(network: str) -> Path:
    """The network's ONNX file, by the older exporter; of pictures in opset 13: deepsparse reads no later one."""
    file = FOLDER / f"{network}.onnx"

    def write(partial: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                build(network),
                (torch.zeros(1, *shape(network)),),
                str(partial),
                opset_version=13 if shape(network) == PICTURE and network.partition("-")[0] not in NETWORKS else 17,
                dynamo=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )

    if not file.exists():
        write_atomically(file, write)
    return file


def onnx_int8(network: str) -> Path:
    """Quantised by onnxruntime: static, per channel, calibrated on random numbers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Examples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(torch.split(inputs(2, network), 1))

        def get_next(self) -> dict[str, object] | None:
            return {"input": self.left.pop().numpy()} if self.left else None

    file = FOLDER / f"{network}.int8.onnx"
    if not file.exists():
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        write_atomically(
            file,
            lambda partial: quantize_static(
                onnx(network), partial, Examples(), quant_format=QuantFormat.QDQ, per_channel=True, **types
            ),
        )
    return file


def _made(name: str, variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = _create(name)
    if variant != "dense":
        density = 1 - float(variant.removesuffix("erk").removesuffix("x4")) / 100
        _prune(model, density, "erk" if variant.endswith("erk") else "uniform", 4 if variant.endswith("x4") else 1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None  # the mean of what it sees
    with torch.no_grad():
        if norms:
            model.train()(inputs(4, name))
    return model


@torch.no_grad()
def _prune(model: nn.Module, density: float, spread: str, block: int) -> None:
    """Keep the largest weights of every layer but the first and depthwise ones, `density` of all of them together.

    They are kept in blocks of so many input channels, by the sum of their sizes.
    """
    layers = {
        f"{name}.{own}": weight
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1 and name != "conv1"
        for own, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
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
