"""The package for Hugging Face's ``kernels``, built from this tree and loaded from its folder; nothing is fetched."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy import act
from rarefy.act.spec import formats

pytest.importorskip("kernels.layer", reason="needs the package kernels")
import kernels

SOURCE = Path(__file__).parents[2] / "kernels" / "activation"
UNARY = {
    "silu": act.silu,
    "gelu": act.gelu,
    "gelu_tanh": lambda x: act.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: act.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: act.gelu(x, approximate="tanh"),
    "gelu_quick": act.quick_gelu,
}
LAYERS = {"SiLU": act.silu, "GeLU": act.gelu, "QuickGELU": act.quick_gelu}
LAYERS |= {"Silu": act.silu, "Gelu": act.gelu}
LAYERS |= dict.fromkeys(("GeluTanh", "NewGELU", "FastGELU"), UNARY["gelu_tanh"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("activation")
    spec = importlib.util.spec_from_file_location("build_kernel_package", SOURCE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(found / "build")
    return found


@pytest.fixture(scope="module")
def package(folder):
    return kernels.get_local_kernel(folder)


@pytest.fixture(scope="module")
def numbers():
    return torch.from_numpy(formats.BF16.all_bits().astype("uint16")).view(torch.bfloat16)


@pytest.mark.parametrize("name", UNARY)
def test_functions(package, numbers, name):
    for x in (numbers, torch.randn(3, 41)):
        out = torch.empty_like(x)
        assert getattr(package, name)(out, x) is out
        torch.testing.assert_close(out, UNARY[name](x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gated_functions(package, name, dtype):
    x = torch.randn(5, 2 * 67).to(dtype)
    gate, up = x.chunk(2, -1)
    expected = UNARY[name](gate) * up
    out = torch.empty(5, 67, dtype=dtype)
    assert getattr(package, f"{name}_and_mul")(out, x) is out
    assert torch.equal(out, expected)
    if name == "silu":
        assert torch.equal(package.mul_and_silu(out, torch.cat((up, gate), -1)), expected)


def test_gated_layers(package):
    x = torch.randn(2, 3, 34)
    gate, up = x.chunk(2, -1)
    swapped = torch.cat((up, gate), -1)
    assert torch.equal(package.layers.SiluAndMul()(x), act.silu(gate) * up)
    assert torch.equal(package.layers.MulAndSilu()(swapped), act.silu(gate) * up)
    assert torch.equal(package.layers.GeluAndMul()(x), act.gelu(gate) * up)
    assert torch.equal(package.layers.GeluTanhAndMul()(x), act.gelu_tanh_and_mul(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_the_place_of_others(folder, name):
    @kernels.use_kernel_forward_from_hub(name)
    class Layer(nn.Module):
        def forward(self, input):
            raise AssertionError("the kernel's forward was to take the place of this")

    repository = kernels.LocalLayerRepository(folder, layer_name=name)
    with kernels.use_kernel_mapping({name: {"cpu": repository}}):
        model = nn.Sequential(nn.Linear(8, 8), Layer())
        for mode in (
            kernels.Mode.TRAINING,
            kernels.Mode.INFERENCE,
            kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE,
        ):
            kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
            x = torch.randn(3, 8)
            assert torch.equal(model(x), LAYERS[name](model[0](x)))
    (found,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    (expected,) = torch.autograd.grad(LAYERS[name](model[0](x)).sum(), model[0].weight)
    assert torch.equal(found, expected)


TRANSFORMERS = """
import sys
from pathlib import Path

import kernels
from transformers.utils import import_utils

# the version that is asked for may be newer than any there is
import_utils.is_kernels_available.__wrapped__.__defaults__ = ("0.17", "1")

import torch
import transformers

folder, saved = map(Path, sys.argv[1:])
names = ("SiLU", "GeLU", "GeluTanh", "NewGELU", "FastGELU", "QuickGELU")
kernels.register_kernel_mapping(
    {name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=name)} for name in names}
)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
text = {"input_ids": torch.arange(10)[None]}
for kind, config, given in (
    (transformers.BertModel, transformers.BertConfig(vocab_size=50, **small), text),
    (transformers.GPT2Model, transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2), text),
    (transformers.CLIPTextModel, transformers.CLIPTextConfig(vocab_size=50, eos_token_id=9, **small), text),
    (
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(image_size=32, patch_size=16, **small),
        {"pixel_values": torch.randn(1, 3, 32, 32)},
    ),
):
    model = kind(config).eval()
    model.save_pretrained(saved)
    swapped = kind.from_pretrained(saved, use_kernels=True)
    torch.testing.assert_close(swapped(**given)[0], model(**given)[0], rtol=1e-4, atol=1e-5)
    acts = [module.forward.__func__.__module__ for module in swapped.modules() if "GELU" in type(module).__name__]
    assert acts and all(name.startswith("_activation_cpu_") for name in acts), acts
assert "rarefy" not in sys.modules
print("all four")
"""


@pytest.mark.slow
def test_transformers_use_kernels(folder, tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", TRANSFORMERS, str(folder), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout.strip().endswith("all four"), ended.stdout + ended.stderr
