"""Networks that compute with the sequence in front of the batch, or with both in one axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine
from tests.engine.networks import thinned


class Inside(nn.Module):
    """A function between two linear layers, on (batch, 6, 8)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.before, self.after = function, nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.places, self.scale = nn.Parameter(torch.randn(6, 1, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.after(self.function(self, self.before(x)))


#: What is computed of (batch, 6, 8) with the batch elsewhere.
FUNCTIONS = {
    "layer": lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1),
    "rows": lambda m, x: m.inner(x.transpose(0, 1).reshape(-1, 8)).reshape(6, -1, 8).transpose(0, 1),
    "last axis": lambda m, x: F.gelu(x.permute(1, 2, 0)).permute(2, 0, 1),
    "residual": lambda m, x: (x.transpose(0, 1) + F.silu(m.norm(m.inner(x.transpose(0, 1))))).transpose(0, 1),
    "places": lambda m, x: ((x.transpose(0, 1) + m.places) * m.scale).transpose(0, 1),
    "inner": lambda m, x: (
        F.relu(x.transpose(0, 1).reshape(6, -1, 4)).reshape(6, -1, 2, 4).transpose(0, 1).flatten(2) + x
    ),
    "places of rows": lambda m, x: (
        (x.transpose(0, 1).flatten(0, 1) * m.scale).reshape(6, -1, 8).transpose(0, 1) + m.places.transpose(0, 1)
    ),
    "halves": lambda m, x: torch.cat(
        [F.relu(each).transpose(0, 1) for each in m.inner(x.transpose(0, 1)).chunk(2, 2)], 2
    ),
    "one of all": lambda m, x: m.inner(x.transpose(0, 1))[2].unsqueeze(1),
    "one number": lambda m, x: (2 * x.transpose(0, 1) - 1).clamp(-1, 1).transpose(0, 1),
}


def alone(model, x):
    """The engine of native kernels, and whether all of it is one program; it is right for some batch sizes."""
    compiled = engine.compile(model, x, choose="native")
    for batch in (1, 2, 3, 5):
        y = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(compiled(y), model(y), rtol=1e-4, atol=1e-5)
    return {step.program for step in compiled.steps()} == {0}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("batch", [1, 4])
def test_operators_on_values_with_the_batch_elsewhere_run_in_one_program(name, batch):
    torch.manual_seed(0)
    assert alone(Inside(FUNCTIONS[name]).eval(), torch.randn(batch, 6, 8))


#: What cannot go sample by sample: it must stay right.
ACROSS = {
    "along the batch": lambda m, x: F.softmax(x.transpose(0, 1), 1).transpose(0, 1),
    "of the other order": lambda m, x: (
        F.relu(m.inner(torch.cat([x, x]).transpose(0, 1))).transpose(0, 1).unflatten(0, (2, -1))[0]
    ),
    "a norm over the batch": lambda m, x: (x.transpose(0, 1) - x.transpose(0, 1).mean(1, keepdim=True)).transpose(0, 1),
    "both ways": lambda m, x: x + m.inner(x.flip(0).transpose(0, 1)).transpose(0, 1),
    "the first of the batch": lambda m, x: m.inner(x.transpose(0, 1) * x[:1].transpose(0, 1)).transpose(0, 1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_what_looks_along_the_batch_stays_right(name):
    torch.manual_seed(0)
    assert not alone(Inside(ACROSS[name]).eval(), torch.randn(3, 6, 8))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_pytorch_is_one_program(norm_first, batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                16, 2, 24, activation="gelu", batch_first=batch_first, norm_first=norm_first
            )
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.last = nn.Linear(16, 5)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            y = self.encoder(x)
            return self.last(y if batch_first else y.transpose(0, 1))

    torch.manual_seed(0)
    assert alone(thinned(Net(), 0.3), torch.randn(2, 7, 16))
