"""Models of transformers, small and random: no activation runs that is neither replaced nor named in the report."""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy import act
from tests.act.test_functional import same

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

#: What PyTorch runs for the functions that there are here; the backward operators do not count.
NAMES = ("tanh", "sigmoid", "silu", "gelu", "mish", "softplus", "hardswish", "elu", "glu")


class Seen(TorchDispatchMode):
    """Counts the activations of PyTorch, and ours."""

    def __init__(self):
        super().__init__()
        self.theirs, self.ours = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function.name().split("::")
        name = name.split(".")[0].rstrip("_")
        if space == "rarefy":
            self.ours[args[1] if name == "activation" else name] += 1
        elif name in NAMES:
            self.theirs[name] += 1
        return function(*args, **(kwargs or {}))


IDS = torch.arange(14).reshape(2, 7)
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
DECODER = SIZES | WORDS | {"num_key_value_heads": 1, "head_dim": 16}
IMAGES = SIZES | {"image_size": 16, "patch_size": 8}
WHISPER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8},
    **{"max_source_positions": 16, "decoder_start_token_id": 0},
}


def words():
    return {"input_ids": IDS}


def pictures():
    return {"pixel_values": torch.randn(2, 3, 16, 16).bfloat16()}


def both():
    return {"input_ids": IDS, "decoder_input_ids": IDS}


def clip():
    text = SIZES | WORDS
    return transformers.CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=16)


T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0} | WORDS
MODELS = {
    "Bert": ("BertForSequenceClassification", "BertConfig", SIZES | WORDS, words),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_head": 2, "n_layer": 2} | WORDS, words),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, both),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, words),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES | WORDS | {"num_key_value_heads": 1}, words),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER, words),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 2}, words),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"attn_implementation": "eager"}, words),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, words),
    "Siglip": ("SiglipVisionModel", "SiglipVisionConfig", IMAGES, pictures),
    "CLIP": ("CLIPModel", "CLIPConfig", None, lambda: words() | pictures()),
    "ViT": ("ViTModel", "ViTConfig", IMAGES, pictures),
    "Whisper": (
        *("WhisperModel", "WhisperConfig", WHISPER | WORDS),
        lambda: {"input_features": torch.randn(2, 8, 32).bfloat16(), "decoder_input_ids": IDS},
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", SIZES | WORDS, words),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES | WORDS, words),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2} | WORDS, words),
    "Mamba": ("MambaForCausalLM", "MambaConfig", WORDS | {"hidden_size": 32, "num_hidden_layers": 2}, words),
}


def make(name, dtype=torch.bfloat16):
    kind, config, sizes, given = MODELS[name]
    made = clip() if sizes is None else getattr(transformers, config)(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, kind)(made).to(dtype).eval(), given()


def first(output):
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_activation_of_a_model_is_in_the_report(name, dtype):
    model, given = make(name, dtype)
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    with Seen() as before:
        want = first(model(**given))
    assert before.theirs
    report = act.swap(model)
    model(**given)
    with Seen() as after:
        got = first(model(**given))
    assert torch.allclose(got.float(), want.float(), atol=0.1)
    told = " ".join(reason for _, reason in report.kept)
    assert all(name in told for name in after.theirs)
    if dtype == torch.bfloat16:
        assert not after.theirs
        assert report.replaced
        assert after.ours
    report.restore()
    assert torch.equal(first(model(**given)), want)


#: What has no function here, or is not one of those that are replaced.
OTHERS = ("laplace", "leaky_relu", "linear", "relu", "relu2", "relu6", "prelu", "xielu")
WHOLE = {
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("quick_gelu", "mish", "hardswish", "sigmoid", "tanh")},
}


@pytest.mark.parametrize("name", transformers.activations.ACT2CLS)
def test_every_activation_of_transformers(name):
    model = transformers.activations.ACT2FN[name].bfloat16()
    x = torch.randn(200).bfloat16() * 3
    report = act.swap(model)
    with torch.no_grad(), Seen() as seen:
        y = model(x)
    if name in WHOLE:
        function = WHOLE[name]
        want = act.gelu(x, approximate="tanh") if function == "gelu_tanh" else getattr(act, function)(x)
        assert same(y, want)
        assert seen.ours == {function: 1}
        assert len(report.replaced) == 1
        assert not report.watched
    elif name in OTHERS:
        assert set(seen.theirs) <= {"softplus"}
        assert not report.kept
    else:
        assert name in ("gelu_10", "sqrtsoftplus")
        want = act.gelu(x).clamp(-10, 10) if name == "gelu_10" else act.softplus(x).sqrt()
        assert same(y, want)
        assert len(report.replaced) == 1
    assert not seen.theirs or "softplus" in str(report.kept) or name in OTHERS


def test_save_and_load_and_generate(tmp_path):
    model, given = make("Gemma3", torch.float32)
    with torch.no_grad():
        before = model(**given).logits
        report = act.swap(model, "hard")
        want = model(**given).logits
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(auto) is transformers.Gemma3ForCausalLM
        for loaded in (auto, again):
            assert torch.equal(loaded(**given).logits, before)
            act.swap(loaded, "hard")
            assert same(loaded(**given).logits, want)
        tokens = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, copy.deepcopy(model).generate(**given, max_new_tokens=3, do_sample=False))
    report.restore()
    assert type(model) is transformers.Gemma3ForCausalLM


def test_other_methods_of_a_model_and_its_parts():
    model, given = make("CLIP")
    plain = copy.deepcopy(model)
    act.swap(model, "hard")
    with torch.no_grad(), Seen() as seen:
        one = model.get_image_features(pixel_values=given["pixel_values"])
        other = plain.get_image_features(pixel_values=given["pixel_values"])
        assert seen.ours["quick_gelu"] == 2
        assert not torch.equal(first(one), first(other))
        assert model.text_model(input_ids=IDS) is not None
    assert seen.ours["quick_gelu"] == 4


def test_training_with_checkpoints_has_the_same_gradients():
    model, given = make("Llama")
    again = copy.deepcopy(model)
    for each in (model, again):
        act.swap(each, "ktanh")
        each.train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, again):
        each(**given, labels=IDS).loss.backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_modules_of_other_libraries_like_theirs():
    """diffusers' GELU and GEGLU, as they are written: default arguments, control flow on the device, keywords."""

    class GEGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 16)

        def gelu(self, gate):
            if gate.device.type == "mps" and len(gate.shape) > 99:
                return torch.nn.functional.gelu(gate.to(dtype=torch.float32)).to(dtype=gate.dtype)
            return torch.nn.functional.gelu(gate)

        def forward(self, hidden_states, *args, **kwargs):
            hidden_states = self.proj(hidden_states)
            hidden_states, gate = hidden_states.chunk(2, dim=-1)
            return hidden_states * self.gelu(gate)

    model, x = GEGLU().bfloat16(), torch.randn(4, 8).bfloat16()
    report = act.swap(model)
    hidden, gate = model.proj(x).chunk(2, dim=-1)
    assert same(model(x), hidden * act.gelu(gate))
    assert report.replaced == [("", "gelu called")]
