"""The networks of the zoo: timm's, transformers' and those of zoo_models.py, with random weights, pruned.

Importing this needs neither package; :func:`build` imports the one that its network is from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import zoo_models as plain

DENSITY = 0.1


@dataclass(frozen=True)
class Input:
    """Of one sample: its shape, of normal numbers, or of integers in [0, below)."""

    shape: tuple[int, ...]
    below: int = 0

    def random(self, batch: int, generator: torch.Generator) -> Tensor:
        """Of this batch size."""
        shape = (batch, *self.shape)
        if self.below:
            return torch.randint(self.below, shape, generator=generator)
        return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Network:
    """What makes it and what it takes; ``source`` is the package."""

    name: str
    source: str
    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]

    def random(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs, the same ones each time."""
        generator = torch.Generator().manual_seed(batch)
        return tuple(each.random(batch, generator) for each in self.inputs)

    @property
    def shape(self) -> str:
        """Of its inputs for one sample, in words."""
        return "; ".join("x".join(map(str, each.shape)) or "1" for each in self.inputs)


def pictures(side: int) -> Input:
    """RGB pictures of this height and width."""
    return Input((3, side, side))


#: timm's networks by the side of the pictures.
TIMM = {
    128: "convnext_tiny convnextv2_atto cspdarknet53 densenet121 dla34 dpn68b eca_nfnet_l0 ecaresnet26t "
    "efficientvit_b0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 hrnet_w18_small inception_next_atto legacy_xception "
    "mambaout_femto mobilevit_s poolformer_s12 repvgg_a0 repvit_m1 res2net50_26w_4s resnest14d resnet18 resnet50 "
    "resnext50_32x4d rexnet_100 seresnet50 skresnet18 vgg11_bn wide_resnet50_2 xception41",
    160: "edgenext_x_small efficientnet_b0 ghostnetv2_100 inception_v3 lcnet_050 mixnet_s mnasnet_100 mobilenetv2_100 "
    "mobilenetv3_large_100 mobilenetv4_conv_small regnety_008 tf_efficientnetv2_b0 vit_small_patch16_224",
    224: "coat_lite_tiny deit_tiny_patch16_224 efficientformer_l1 eva02_tiny_patch14_224 gmlp_ti16_224 levit_128s "
    "mixer_s32_224 resmlp_12_224 swin_tiny_patch4_window7_224 vit_tiny_patch16_224",
    256: "maxvit_pico_rw_256",
}


class _Unused(ModuleType):
    """A module of torchvision in which every name is a class; no instance of one is ever made."""

    __path__: list[str] = []  # noqa: RUF012 (a package's, as Python reads it)

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        modes = {"NEAREST": 0, "LANCZOS": 1, "BILINEAR": 2, "BICUBIC": 3, "BOX": 4, "HAMMING": 5}  # of pictures
        return type(name, (nn.Module,), modes)


def _timm(name: str, side: int) -> nn.Module:
    # timm imports torchvision for its transforms and data sets, which no network here needs, and for one class that it
    # looks for in a network. The torchvision that goes with PyTorch's builds for the CPU is not on PyPI.
    for module in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets"):
        sys.modules[f"torchvision{module}"] = made = _Unused(f"torchvision{module}")
        parent, _, child = made.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
    import timm

    sized = name.startswith("vit_small")  # the others are as large as their name says, or of any size
    model: nn.Module = timm.create_model(name, pretrained=False, **({"img_size": side} if sized else {}))
    return model


class Take(nn.Module):
    """A model of transformers that is called with tensors by position and answers a tensor."""

    def __init__(
        self, model: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...], fixed: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.fixed = model, names, outputs, dict(fixed)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        answer = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        found = tuple(getattr(answer, name) for name in self.outputs)
        return found[0] if len(found) == 1 else found


def _transformers(
    kind: str, names: tuple[str, ...], outputs: tuple[str, ...], fixed: Mapping[str, Any], options: Mapping[str, Any]
) -> nn.Module:
    import transformers

    made: type = getattr(transformers, kind)
    config = made.config_class(**options)  # type: ignore[attr-defined]
    if kind == "DetrForObjectDetection":
        # Its ResNet is a small one, and no weights are fetched for it.
        small = {
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 256],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
        }
        config.backbone_config = transformers.ResNetConfig(**small, out_features=["stage4"])
    model = made(config).eval()
    return Take(model.get_encoder() if kind == "WhisperModel" else model, names, outputs, fixed)


TOKENS = 1000
BERT = {
    "vocab_size": TOKENS,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 130,
}
VISION = {
    **BERT,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 128,
    "patch_size": 16,
}
SOUND = {
    **{
        "vocab_size": 32,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
    },
    **{"conv_dim": (96,) * 7, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8},
}
WORDS = {"input_ids": Input((64,), TOKENS)}
HIDDEN = ("last_hidden_state",)


def _hugging(
    name: str,
    kind: str,
    inputs: Mapping[str, Input],
    options: Mapping[str, Any],
    outputs: tuple[str, ...] = HIDDEN,
    fixed: Mapping[str, Any] | None = None,
) -> Network:
    names = tuple(inputs)
    return Network(
        name, "transformers", lambda: _transformers(kind, names, outputs, fixed or {}, options), tuple(inputs.values())
    )


def _hugging_all() -> list[Network]:
    image, sound = {"pixel_values": pictures(128)}, {"input_values": Input((8000,))}
    unmasked = {**BERT, "attn_implementation": "sdpa"}
    names = {"vocab_size", "num_hidden_layers", "num_attention_heads"}
    small = {key: value for key, value in BERT.items() if key in names}
    decoder = {**BERT, "num_key_value_heads": 2, "intermediate_size": 704}
    return [
        _hugging("albert", "AlbertModel", WORDS, {**BERT, "embedding_size": 128}),
        _hugging("bert", "BertModel", {**WORDS, "attention_mask": Input((64,), 2)}, BERT),
        _hugging("bert_sdpa_nomask", "BertModel", WORDS, unmasked),
        _hugging(
            "clip_text",
            "CLIPTextModel",
            {"input_ids": Input((32,), TOKENS)},
            {**BERT, "hidden_size": 192, "eos_token_id": 2},
        ),
        _hugging("clip_vision", "CLIPVisionModel", image, VISION),
        _hugging("conformer", "Wav2Vec2ConformerModel", sound, SOUND),
        _hugging(
            "deberta_v2",
            "DebertaV2Model",
            WORDS,
            {
                **BERT,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 32,
                "type_vocab_size": 0,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
            },
        ),
        _hugging(
            "detr",
            "DetrForObjectDetection",
            {"pixel_values": pictures(160)},
            {
                "use_pretrained_backbone": False,
                "use_timm_backbone": False,
                "backbone": None,
                "d_model": 128,
                "num_queries": 20,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 512,
                "decoder_ffn_dim": 512,
                "num_labels": 20,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
            },
            ("logits", "pred_boxes"),
        ),
        _hugging(
            "dinov2",
            "Dinov2Model",
            {"pixel_values": pictures(112)},
            {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 112, "patch_size": 14},
        ),
        _hugging(
            "distilbert",
            "DistilBertModel",
            WORDS,
            {"vocab_size": TOKENS, "dim": 256, "n_layers": 4, "n_heads": 4, "hidden_dim": 1024},
        ),
        _hugging(
            "gpt2",
            "GPT2LMHeadModel",
            WORDS,
            {"vocab_size": TOKENS, "n_embd": 256, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
            ("logits",),
            {"use_cache": False},
        ),
        _hugging(
            "hf_resnet",
            "ResNetModel",
            image,
            {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
            ("pooler_output",),
        ),
        _hugging("hf_vit", "ViTModel", image, VISION),
        _hugging("hubert", "HubertModel", sound, SOUND),
        _hugging("llama", "LlamaForCausalLM", WORDS, decoder, ("logits",), {"use_cache": False}),
        _hugging(
            "mamba",
            "MambaModel",
            {"input_ids": Input((32,), TOKENS)},
            {"vocab_size": TOKENS, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 8},
            HIDDEN,
            {"use_cache": False},
        ),
        _hugging(
            "mobilebert",
            "MobileBertModel",
            WORDS,
            {
                **small,
                "hidden_size": 256,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "intra_bottleneck_size": 64,
                "embedding_size": 64,
            },
        ),
        _hugging(
            "phi_moe_mixtral",
            "MixtralForCausalLM",
            {"input_ids": Input((32,), TOKENS)},
            {
                **decoder,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            ("logits",),
            {"use_cache": False},
        ),
        _hugging("roberta", "RobertaModel", WORDS, BERT),
        _hugging("segformer", "SegformerForSemanticSegmentation", image, {"num_labels": 19}, ("logits",)),
        _hugging("squeezebert", "SqueezeBertModel", WORDS, {**BERT, "embedding_size": 256}),
        _hugging(
            "t5_encoder",
            "T5EncoderModel",
            WORDS,
            {"vocab_size": TOKENS, "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4},
        ),
        _hugging("wav2vec2", "Wav2Vec2Model", sound, SOUND),
        _hugging(
            "whisper_encoder",
            "WhisperModel",
            {"input_features": Input((80, 200))},
            {
                "vocab_size": TOKENS,
                "d_model": 256,
                "encoder_layers": 4,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 1024,
                "decoder_layers": 1,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 256,
                "max_source_positions": 100,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
        ),
    ]


def _plain_all() -> list[Network]:
    made: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
        "convtasnet": (plain.ConvTasNet, ((1, 8000),)),
        "crnn": (plain.CRNN, ((1, 32, 128),)),
        "cyclegan": (plain.cyclegan, ((3, 128, 128),)),
        "dcgan": (plain.dcgan, ((100, 1, 1),)),
        "deeplab": (plain.DeepLab, ((3, 160, 160),)),
        "edsr": (plain.EDSR, ((3, 64, 64),)),
        "espcn": (plain.espcn, ((1, 96, 96),)),
        "fpn_det": (plain.Pyramid, ((3, 160, 160),)),
        "gru_speech": (plain.SpeechGRU, ((1, 80, 200),)),
        "m5": (plain.m5, ((1, 8000),)),
        "nn_transformer": (plain.TimeTransformer, ((64, 40),)),
        "pointnet": (plain.PointNet, ((3, 512),)),
        "quartznet": (plain.quartznet, ((64, 300),)),
        "r3d": (plain.r3d, ((3, 8, 64, 64),)),
        "shufflenet_v2": (plain.shufflenet_v2, ((3, 160, 160),)),
        "siamese": (plain.Siamese, ((1, 64, 64), (1, 64, 64))),
        "squeezenet": (plain.squeezenet, ((3, 160, 160),)),
        "tab_mlp": (plain.tab_mlp, ((64,),)),
        "tcn": (plain.tcn, ((8, 256),)),
        "unet": (plain.UNet, ((3, 128, 128),)),
        "unet_bilinear": (lambda: plain.UNet(bilinear=True), ((3, 128, 128),)),
        "vae": (plain.VAE, ((3, 64, 64),)),
        "wavenet": (plain.WaveNet, ((1, 2000),)),
        "yolo": (plain.YOLO, ((3, 256, 256),)),
    }
    found = [Network(name, "plain", make, tuple(map(Input, shapes))) for name, (make, shapes) in made.items()]
    tagger = Network("lstm_tagger", "plain", plain.LSTMTagger, (Input((64,), 5000),))
    recommends = Network("ncf", "plain", plain.NCF, (Input((), 1000), Input((10,), 2000), Input((13,))))
    return sorted([*found, tagger, recommends], key=lambda network: network.name)


def _timm_all() -> list[Network]:
    sides = sorted((name, side) for side, names in TIMM.items() for name in names.split())
    return [
        Network(name, "timm", lambda name=name, side=side: _timm(name, side), (pictures(side),))  # type: ignore[misc]
        for name, side in sides
    ]


NETWORKS = {network.name: network for network in (*_timm_all(), *_hugging_all(), *_plain_all())}


def build(network: Network) -> tuple[nn.Module, float]:
    """The network in evaluation mode, and the share of nonzero weights among all of its layers."""
    torch.manual_seed(0)
    model = network.make().eval().requires_grad_(False)
    _disturb_constants(model)
    layers = _layers(model)
    _prune(layers[1:])
    _normalise(model, network.random(8))
    weights = {id(layer): layer.weight for layer in layers}.values()
    left = sum(int(weight.count_nonzero()) for weight in weights)
    return model, left / sum(weight.numel() for weight in weights)


def _layers(model: nn.Module) -> list[Any]:
    """Convolutions and linear layers, transformers' Conv1D included; a weight that two share counts once."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    found = {
        id(module.weight if "parametrizations" not in module._modules else module): module
        for module in model.modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }
    return list(found.values())


@torch.no_grad()
def _disturb_constants(model: nn.Module) -> None:
    """No parameter stays as its initialisation made it where that is one number: what is dropped would not show."""
    for parameter in model.parameters():
        first = parameter.flatten()[:1]
        if parameter.is_floating_point() and bool((parameter == first).all()):
            spread = 0.2 * first.abs() if first.abs() > 1e-2 else 0.1
            parameter.add_(spread * torch.randn_like(parameter))


@torch.no_grad()
def _prune(layers: list[Any]) -> None:
    """The largest tenth of the weights of each layer stays; of a normalised weight, of its direction."""
    for layer in layers:
        normalised = "parametrizations" in layer._modules
        weight = layer.parametrizations.weight.original1 if normalised else layer.weight
        zeros = round((1 - DENSITY) * weight.numel())
        weight[weight.abs() <= weight.abs().flatten().kthvalue(zeros).values] = 0.0


@torch.no_grad()
def _normalise(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Batch normalisations get the statistics of random data, then some noise: folding them must be seen."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.momentum = None  # the mean of what it sees
        norm.reset_running_stats()
        norm.train()
    if norms:
        model(*inputs)
    for norm in norms:
        norm.eval()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # A channel that hardly varies on so few inputs would magnify rounding without end.
        norm.running_var.clamp_(min=0.01 * float(norm.running_var.mean()))
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(0.8 + 0.4 * torch.rand_like(norm.running_var))
