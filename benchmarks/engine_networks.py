"""Networks of other kinds for the benchmark of the engine: transformers', and the zoo's own.

Each takes one tensor of floats and gives one. Those of the package transformers have its default sizes: those of
ViT-B/16, ConvNeXt-T, and of the encoder of Whisper-tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zoo_models


class Hidden(nn.Module):
    """A model of the package transformers: its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.model(x, return_dict=False)[0]  # type: ignore[no-any-return]


def vit() -> nn.Module:
    """ViT-B/16."""
    from transformers import ViTConfig, ViTModel

    return Hidden(ViTModel(ViTConfig(attn_implementation="sdpa"), add_pooling_layer=False))


def convnext() -> nn.Module:
    """ConvNeXt-T."""
    from transformers import ConvNextConfig, ConvNextModel

    return Hidden(ConvNextModel(ConvNextConfig()))


def whisper() -> nn.Module:
    """The encoder of Whisper-tiny."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    return Hidden(WhisperEncoder(WhisperConfig(**sizes, attn_implementation="sdpa")))


class Detector(nn.Module):
    """YOLO with all that it finds in one tensor: (batch, numbers, places)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo_models.YOLO()

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return torch.cat([found.flatten(2) for found in self.model(x)], 1)


class Denoiser(nn.Module):
    """RNNoise: gains of 22 bands from 42 features of every frame, by three recurrent layers: (batch, frames, 42)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(42, 24)
        self.voice = nn.GRU(24, 24, batch_first=True)
        self.noise = nn.GRU(90, 48, batch_first=True)
        self.clean = nn.GRU(114, 96, batch_first=True)
        self.gains = nn.Linear(96, 22)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise."""
        first = torch.tanh(self.first(x))
        voice = self.voice(first)[0]
        noise = self.noise(torch.cat([first, voice, x], 2))[0]
        return torch.sigmoid(self.gains(self.clean(torch.cat([voice, noise, x], 2))[0]))


@dataclass(frozen=True)
class Network:
    """What makes it, and the shape of one example."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS = {
    "vit": Network(vit, (3, 224, 224)),
    "convnext": Network(convnext, (3, 224, 224)),
    "yolo": Network(Detector, (3, 320, 320)),
    "whisper": Network(whisper, (80, 3000)),
    "rnnoise": Network(Denoiser, (100, 42)),
    "unet": Network(zoo_models.UNet, (3, 256, 256)),
}
