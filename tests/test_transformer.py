"""``nn.Transformer`` and its encoder, which without gradient gives zeros where it is padded, as engine and as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from rarefy import engine
from rarefy._transformer import traceable_transformers
from rarefy.onnx_files import save_onnx

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

LENGTHS = {
    "none": torch.zeros(3, 5, dtype=torch.bool),
    "at the end": torch.arange(5) >= torch.tensor([[5], [2], [3]]),
    "a whole sample": torch.arange(5) >= torch.tensor([[5], [0], [3]]),
    "in front": torch.arange(5) < torch.tensor([[0], [2], [3]]),
}


class Encoder(nn.Module):
    """Its padding is read in what comes behind it."""

    def __init__(self, heads: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6 * heads, heads, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(6 * heads), **options)
        nn.init.normal_(self.encoder.norm.bias)

    def forward(self, x: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        y = self.encoder(x, src_key_padding_mask=padded)
        return y, y.mean(1)


def answers(model: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("choose", ["native", "torch"])
@pytest.mark.parametrize("example", ["none", "at the end"])
def test_an_engine_gives_what_the_model_gives_at_padded_places(example: str, choose: Any) -> None:
    model, x = Encoder().eval(), torch.randn(3, 5, 12)
    compiled = engine.compile(model, (x, LENGTHS[example]), choose=choose)
    assert compiled.batch is None
    for padded in LENGTHS.values():
        torch.testing.assert_close(compiled(x, padded), answers(model, x, padded), rtol=1e-4, atol=1e-5)
    zeros = compiled(x, LENGTHS["at the end"])[0][1, 2:]
    torch.testing.assert_close(zeros, model.encoder.norm.bias.detach().expand(3, 12))


@pytest.mark.parametrize("number", [float("-inf"), -0.5])
def test_numbers_that_are_added_are_padding_to_nested_tensors(number: float) -> None:
    model, x = Encoder().eval(), torch.randn(3, 5, 12)
    padded, none = (torch.zeros(3, 5).masked_fill(LENGTHS[name], number) for name in ("at the end", "none"))
    compiled = engine.compile(model, (x, none), choose="native")
    torch.testing.assert_close(compiled(x, padded), answers(model, x, padded), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{"enable_nested_tensor": False}, {"heads": 3}, {"mask_check": False}])
def test_encoders_with_other_ways(options: dict[str, Any]) -> None:
    model = Encoder(**options).eval()
    x = torch.randn(3, 5, 6 * options.get("heads", 2))
    compiled = engine.compile(model, (x, LENGTHS["none"]), choose="native")
    padded = LENGTHS["at the end"]
    torch.testing.assert_close(compiled(x, padded), answers(model, x, padded), rtol=1e-4, atol=1e-5)


def test_a_whole_transformer_reads_the_zeros() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, x: Tensor, y: Tensor, padded: Tensor) -> Tensor:
            return self.transformer(x, y, src_key_padding_mask=padded)  # type: ignore[no-any-return]

    model, x, y = Whole().eval(), torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    compiled = engine.compile(model, (x, y, LENGTHS["none"]), choose="native")
    given = (x, y, LENGTHS["at the end"])
    torch.testing.assert_close(compiled(*given), answers(model, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [None, True])
def test_masks_whose_numbers_are_not_read(causal: bool | None) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval(), torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    masks = [nn.Transformer.generate_square_subsequent_mask(4), torch.randn(4, 4)]
    given = {"src": x, "tgt": y, "tgt_mask": masks[0], "tgt_is_causal": causal}
    compiled = engine.compile(model, given, choose="native")
    for mask in masks[: 2 if causal is None else 1]:
        with torch.no_grad():
            expected = model(x, y, tgt_mask=mask)
        torch.testing.assert_close(compiled(x, y, tgt_mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_pytorchs_own_functions_come_back() -> None:
    def found() -> tuple[Any, Any]:
        return nn.TransformerEncoder.forward, transformer._detect_is_causal_mask

    before = found()
    with traceable_transformers():
        assert not {*before} & {*found()}
    assert found() == before


@pytest.mark.slow
def test_an_onnx_file_gives_what_the_model_gives_at_padded_places(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Encoder().eval(), torch.randn(3, 5, 12)
    save_onnx(model, {"x": x, "padded": LENGTHS["none"]}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for padded in LENGTHS.values():
        found = session.run(None, {"x": x.numpy(), "padded": padded.numpy()})
        expected = answers(model, x, padded)
        torch.testing.assert_close(tuple(map(torch.from_numpy, found)), expected, rtol=1e-4, atol=1e-5)
