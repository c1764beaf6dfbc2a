"""Products with constants are layers, however a model writes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine
from rarefy.engine import contractions


class Written(nn.Module):
    """A function of x and parameters."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.own = function, nn.ParameterList(parameters)

    def forward(self, x):
        return self.function(x, *self.own)


W, BIAS = torch.randn(24, 16), torch.randn(24)
ROWS, PLACES, IMAGES = (2, 5, 16), (2, 16, 5), (2, 4, 5, 16)
FORMS = {
    "x @ w.T": (lambda x, w: x @ w.T, ROWS, W),
    "w @ x": (lambda x, w: w @ x, PLACES, W),
    "w[None] @ x": (lambda x, w: torch.matmul(w[None], x), PLACES, W),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), ROWS, W),
    "tensordot of two": (lambda x, w: torch.tensordot(x, w, dims=([3, 2], [0, 1])), IMAGES, torch.randn(16, 5, 3)),
    "inner": (torch.inner, ROWS, W),
    "bmm": (lambda x, w: torch.bmm(x, w.T.expand(x.shape[0], -1, -1)), ROWS, W),
    "bmm, left": (lambda x, w: torch.bmm(w.expand(x.shape[0], -1, -1), x), PLACES, W),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b, x, w.T.expand(x.shape[0], -1, -1), beta=0.5, alpha=3.0),
        ROWS,
        W,
        BIAS,
    ),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5, alpha=2.0), (2, 16), W, BIAS),
    "bti,oi->bto": (lambda x, w: torch.einsum("bti,oi->bto", x, w), ROWS, W),
    "oi,bti->bto": (lambda x, w: torch.einsum("oi,bti->bto", w, x), ROWS, W),
    "bit,oi->bot": (lambda x, w: torch.einsum("bit,oi->bot", x, w), PLACES, W),
    "bit,oi->bto": (lambda x, w: torch.einsum("bit,oi->bto", x, w), PLACES, W),
    "...i,io->...o": (lambda x, w: torch.einsum("...i,io->...o", x, w), IMAGES, W.T.contiguous()),
    "bti,ihd->bthd": (lambda x, w: torch.einsum("bti,ihd->bthd", x, w), ROWS, torch.randn(16, 3, 8)),
    "bthd,hdo->bto": (lambda x, w: torch.einsum("bthd,hdo->bto", x, w), (2, 5, 4, 4), torch.randn(4, 4, 8)),
    "weights made of parameters": (lambda x, w, v: F.linear(x, v[:, None] * w / w.norm(dim=1)[:, None]), ROWS, W, BIAS),
    "a part of a parameter": (lambda x, w: F.linear(x, w.chunk(3)[1]), ROWS, W),
    "parameters joined": (lambda x, w, v: F.linear(x, torch.cat([w, v])), ROWS, W, torch.randn(8, 16)),
    "scaled and moved": (lambda x, w, b: F.linear(x, w) * 0.125 + b, ROWS, W, BIAS),
    "scaled by features": (lambda x, w, b: F.linear(x, w, b) * b / 3 - 1, ROWS, W, BIAS),
    "standardised": (
        lambda x, w: F.conv2d(x, F.batch_norm(w.reshape(1, 8, -1), None, None, training=True).reshape_as(w)),
        (2, 4, 9, 9),
        torch.randn(8, 4, 3, 3),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_layer(name):
    function, shape, *parameters = FORMS[name]
    model, x = Written(function, *parameters).eval(), torch.randn(shape)
    compiled = engine.compile(model, x, choose="torch")
    kinds = [step.kind for step in compiled.steps()]
    assert [kind for kind in kinds if kind not in ("permute", "view", "reshape", "sym_size")] in (["linear"], ["conv"])
    for batch in (1, 3):
        given = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(compiled(given), model(given), rtol=1e-5, atol=1e-5)


OTHERS = ("ab,cd->abcd", "abc,abc->ab", "aab,bc->ac", "ab,b->a")
SUMS = ["ab,bc->ac", "ab,cb->ca", "abc,cd->adb", "abcd,bde->abce", *OTHERS]


@pytest.mark.parametrize("equation", [*SUMS, "abc,dcb->ad", "...ab,bc->...ac", "ab...,bc->ac..."])
def test_sums_are_those_of_einsum(equation):
    sizes = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    terms = equation.split("->")[0].replace("...", "de").split(",")
    x, y = (torch.randn([sizes[letter] for letter in term], dtype=torch.float64) for term in terms)
    made = contractions.einsum(equation, (x, y))
    if made is NotImplemented:
        assert equation in OTHERS
    else:
        torch.testing.assert_close(made, torch.einsum(equation, x, y))


@pytest.mark.parametrize("dims", [([0], [1]), ([1, 2], [1, 0]), ([2], [0])])
def test_tensordot(dims):
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    y = y.T if dims == ([0], [1]) else y
    x = x.transpose(0, 2) if dims == ([0], [1]) else x
    torch.testing.assert_close(contractions.tensordot(x, y, *dims), torch.tensordot(x, y, dims=dims))


def test_a_matrix_of_more_axes_gives_its_result_more():
    model, x = Written(lambda x, w: (x @ w[None, None]).squeeze(0), W.T.contiguous()).eval(), torch.randn(ROWS)
    compiled = engine.compile(model, x, choose="native")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
