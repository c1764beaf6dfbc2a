"""Images of another size against PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rarefy import engine, kernels
from rarefy.engine.plan import Resize
from tests.engine.test_norms import ISAS, native

SIZES = [
    ((5, 7), (10, 14)),
    ((16, 9), (31, 18)),
    ((8, 8), (3, 5)),
    ((1, 6), (4, 6)),
    ((6, 1), (1, 9)),
    ((40, 3), (40, 7)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("sizes", "to"), SIZES)
@pytest.mark.parametrize(("mode", "align"), [("nearest", False), ("bilinear", False), ("bilinear", True)])
def test_sizes(isa: str, sizes: tuple[int, int], to: tuple[int, int], mode: str, align: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, *sizes)
    x[0, 1, 0, 0] = float("nan")
    step = Resize(name="r", output="y", input="x", mode=mode, sizes=to, align_corners=align)
    expected = F.interpolate(x, size=to, mode=mode, **({} if mode == "nearest" else {"align_corners": align}))
    results = [native(step, {"x": x}, isa, threads, batch) for threads, batch in ((1, 1), (2, 1), (2, 2))]
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


class _Resized(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layer, self.options = nn.Conv2d(2, 3, 1), options

    def forward(self, x):
        return self.layer(F.interpolate(self.layer(x)[:, :2], **self.options))


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "bilinear"},
        {"scale_factor": 2.1, "mode": "bilinear"},
        {"scale_factor": (0.7, 3.3), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 2.1, "mode": "nearest"},
        {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
        {"size": (19, 4), "mode": "nearest"},
    ],
)
def test_networks(options, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = _Resized(**options).eval(), torch.randn(1, 2, 11, 13)
    made = engine.compile(model, x, choose="native", tune_seconds=0.0)
    assert "resize" in [step.kind for step in made.steps() if step.kernel != "PyTorch"]
    engine.save(made, tmp_path / "resized")
    with kernels.forced("pytorch"):
        plain = engine.compile(model, x)
    for each in (made, engine.load(tmp_path / "resized"), plain):
        for inputs in (x, torch.randn(3, 2, 11, 13)):
            with torch.no_grad():
                torch.testing.assert_close(each(inputs), model(inputs), rtol=1e-5, atol=1e-5)
