"""Embeddings: rows of a table, and bags of them."""

import copy

import pytest
import torch
from torch import nn

from rarefy import engine, kernels
from rarefy.engine.binding import NativeError, available
from rarefy.engine.plan import Embedding
from tests.engine.layers import paths

native = pytest.mark.skipif(not available(), reason="there is no native engine")


class Words(nn.Module):
    """Words by their embeddings, and a layer behind them."""

    def __init__(self, table, last):
        super().__init__()
        self.table, self.last = table, last

    def forward(self, x):
        return self.last(self.table(x))


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize(
    ("shape", "dtype", "width"),
    [
        ((), torch.int64, 1),
        ((), torch.int32, 70),
        ((1,), torch.int64, 3),
        ((7,), torch.int64, 70),
        ((7,), torch.int32, 1),
        ((3, 5), torch.int64, 70),
        ((3, 5), torch.int32, 3),
    ],
)
def test_rows_come_bit_by_bit(isa, shape, dtype, width):
    table = nn.Embedding(19, width)
    model = Words(table, nn.Linear(width, width, bias=False)).eval()
    model.last.weight.data = torch.eye(width)
    x = torch.randint(0, 19, (2, *shape), dtype=dtype)
    with kernels.forced(isa):
        compiled = engine.compile(model, x, choose="native")
        if isa != "pytorch":
            assert [step.note for step in compiled.steps()] == [""] * len(compiled.steps())
        for threads in (1, 3):
            compiled.threads = threads
            for batch in (1, 2, 9):
                x = torch.randint(0, 19, (batch, *shape), dtype=dtype)
                assert torch.equal(compiled(x), table(x))


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_rows(isa, mode):
    bag = nn.EmbeddingBag(50, 70, mode=mode)
    for dtype in (torch.int32, torch.int64):
        x = torch.randint(0, 50, (3, 11), dtype=dtype)
        model = Words(bag, nn.Sequential(nn.Linear(70, 4), nn.ReLU())).eval()
        with kernels.forced(isa):
            compiled = engine.compile(model, x, choose="native")
            kinds = [step.kind for step in compiled.steps() if step.kind not in ("input", "output")]
            assert kinds == (["embedding", "linear"] if isa == "pytorch" else ["embedding", "conv"])
            for batch in (1, 3, 8):
                x = torch.randint(0, 50, (batch, 11), dtype=dtype)
                torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("wrong", [19, -1, 1 << 40, -(1 << 33)])
def test_a_number_that_is_no_row_is_an_error(wrong):
    model = Words(nn.Embedding(19, 4), nn.Linear(4, 2)).eval()
    x = torch.randint(0, 19, (2, 6))
    compiled = engine.compile(model, x, choose="native")
    bad = x.clone()
    bad[1, 5] = wrong
    with pytest.raises(NativeError, match=f"{wrong} is none of the 19 rows of the embedding, 0 to 18"):
        compiled(bad)
    with pytest.raises(NativeError, match="none of the 19 rows"):
        copy.deepcopy(compiled)(bad)
    torch.testing.assert_close(compiled(x), model(x).detach())
    with pytest.raises(TypeError, match="must be torch.int64"):
        compiled(x.int())


class Recommends(nn.Module):
    """Ids, bags of ids and numbers side by side; an id looked up twice, and one that is computed."""

    def __init__(self):
        super().__init__()
        self.users, self.again, self.items = nn.Embedding(30, 8), nn.Embedding(40, 4), nn.EmbeddingBag(20, 8)
        self.numbers, self.score = nn.Linear(5, 8), nn.Linear(32, 1)

    def forward(self, user, items, numbers):
        known = [self.users(user), self.again(user), self.again(user + 3)]
        return self.score(torch.cat([*known, self.items(items), self.numbers(numbers)], 1)).sigmoid()


@native
def test_ids_beside_numbers_are_one_program(tmp_path):
    model = Recommends().eval()
    example = (torch.randint(0, 30, (2,)), torch.randint(0, 20, (2, 6)), torch.randn(2, 5))
    compiled = engine.compile(model, example, choose="native")
    assert [step.kind for step in compiled.steps() if step.program is None] == ["add"]
    engine.save(compiled, tmp_path / "engine.rfy")
    for made in (compiled, engine.load(tmp_path / "engine.rfy"), copy.deepcopy(compiled)):
        for batch in (1, 4):
            x = (torch.randint(0, 30, (batch,)), torch.randint(0, 20, (batch, 6)), torch.randn(batch, 5))
            torch.testing.assert_close(made(*x), model(*x).detach())
    with pytest.raises(NativeError, match="30 is none of the 30 rows of the embedding"):
        compiled(torch.tensor([3, 30]), *example[1:])


def test_words_before_a_convolution_are_one_program():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(30, 12), nn.Conv1d(12, 6, 3)

        def forward(self, x):
            return self.conv(self.table(x).transpose(1, 2)).amax(2)

    model, x = Net().eval(), torch.randint(0, 30, (2, 9))
    compiled = engine.compile(model, x, choose="native")
    if available():
        assert not [step.note for step in compiled.steps() if step.note]
    for batch in (1, 2, 7):
        x = torch.randint(0, 30, (batch, 9))
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)


#: Bags that are no rows of a matrix, and what else PyTorch's embeddings do.
OTHERS = {
    "offsets": (lambda m, x: m(x.flatten(), torch.arange(0, 4 * len(x), 2)), nn.EmbeddingBag(9, 3)),
    "weights": (
        lambda m, x: m(x.flatten(), torch.arange(0, 4 * len(x), 4), torch.full((4 * len(x),), 2.0)),
        nn.EmbeddingBag(9, 3, mode="sum"),
    ),
    "padding": (lambda m, x: m(x), nn.EmbeddingBag(9, 3, padding_idx=2)),
    "padding of rows": (lambda m, x: m(x), nn.Embedding(9, 3, padding_idx=2)),
    "constant ids": (lambda m, x: m(torch.tensor([1, 2, 3, 4])) + x.unsqueeze(2), nn.Embedding(9, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_embeddings_stay_right(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = OTHERS[name][1], nn.Linear(3, 3)

        def forward(self, x):
            return self.last(OTHERS[name][0](self.table, x))

    model, x = Net().eval(), torch.randint(0, 9, (2, 4))
    compiled = engine.compile(model, x, choose="native")
    torch.testing.assert_close(compiled(x), model(x).detach())


def test_a_step_of_what_is_no_reduction_is_refused():
    with pytest.raises(ValueError, match="sum, mean or maximum"):
        Embedding(name="e", output="y", input="x", weight=torch.zeros(2, 2), reduction="min")
