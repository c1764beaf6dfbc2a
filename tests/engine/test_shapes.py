"""Engines for several sizes of the inputs, as one."""

import copy
import logging
import pickle
import threading

import pytest
import torch
from torch import nn

from rarefy import engine
from rarefy.engine import compiler


class Tokens(nn.Module):
    """Of any length, by name."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        return {"y": self.out(x if mask is None else x * mask[..., None]), "length": ids.shape[1]}


def of(length, rows=2):
    return {"ids": torch.randint(10, (rows, length)), "mask": torch.rand(rows, length)}


@pytest.fixture
def made(monkeypatch):
    """The shapes that were compiled for."""
    found, compiled = [], compiler._compiled

    def count(inputs, *rest):
        found.append(tuple(inputs[0].shape))
        return compiled(inputs, *rest)

    monkeypatch.setattr(compiler, "_compiled", count)
    return found


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "rarefy.engine"]


def same(compiled, model, given):
    found, expected = compiled(**given), model(**given)
    torch.testing.assert_close(found["y"], expected["y"])
    assert found["length"] == expected["length"]


def test_sizes_compile_when_they_come_and_the_least_used_go(made, caplog):
    model = Tokens().eval().requires_grad_(False)
    compiled = engine.compile(model, of(5), choose="torch", shapes=2)
    with caplog.at_level(logging.WARNING, "rarefy.engine"):
        for length, rows in ((5, 2), (7, 2), (5, 1), (7, 3), (5, 2)):
            same(compiled, model, of(length, rows))
        assert made == [(2, 5), (2, 7)]  # the batch is free
        assert len(said(caplog)) == 1
        assert "for the new shapes (2, 7), (2, 7) in" in said(caplog)[0]
        assert "2 of at most 2 are kept" in said(caplog)[0]
        same(compiled, model, of(9))  # in the place of 7
    assert "that of (2, 7), (2, 7) is gone" in said(caplog)[1]
    same(compiled, model, of(5))
    assert made == [(2, 5), (2, 7), (2, 9)]
    assert [each.inputs[0].shape for each in compiled.engines] == [(2, 9), (2, 5)]


def test_a_copy_of_the_model_compiles(made):
    model = Tokens().eval().requires_grad_(False)
    compiled = engine.compile(model, of(5), choose="torch", shapes=2)
    before = copy.deepcopy(model)
    model.out.weight.zero_()
    for again in (compiled, copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        same(again, before, of(6))
        same(again, before, of(5))


def test_threads_that_bring_the_same_size_compile_once(made):
    model = Tokens().eval().requires_grad_(False)
    compiled = engine.compile(model, of(5), choose="torch", shapes=2)
    failed = []

    def work():
        try:
            same(compiled, model, of(8))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert made == [(2, 5), (2, 8)]


def test_a_batch_that_is_fixed_is_a_size(made):
    model = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (1, 3)), nn.Flatten(0, 1)).eval().requires_grad_(False)

    class Fixed(nn.Module):
        def forward(self, x):
            return model(x).reshape(len(x), -1)

    compiled = engine.compile(Fixed().eval(), torch.randn(2, 4), choose="torch", shapes=3)
    for rows in (2, 5, 2, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), model(x).reshape(rows, -1))
    assert len(made) == 2


def test_loaded_engines_take_their_sizes_alone(tmp_path):
    model = Tokens().eval().requires_grad_(False)
    compiled = engine.compile(model, of(5), choose="torch", shapes=2)
    same(compiled, model, of(6))
    with pytest.raises(TypeError, match="save each of its engines"):
        engine.save(compiled, tmp_path / "a.engine")
    for number, each in enumerate(compiled.engines):
        engine.save(each, tmp_path / f"{number}.engine")
    loaded = engine.Engines([engine.load(path) for path in sorted(tmp_path.iterdir())])
    for length in (5, 6, 5):
        same(loaded, model, of(length))
    with pytest.raises(ValueError, match=r"must have the shape \(batch, [56]\), got \(2, 7\)"):
        loaded(**of(7))
    one = loaded.engines[0]
    for wrong, message in (([], "1 to 0 engines"), ([one, one], "of the same size")):
        with pytest.raises(ValueError, match=message):
            engine.Engines(wrong)
    other = engine.compile(nn.Linear(4, 3).eval(), torch.zeros(2, 4), choose="torch")
    with pytest.raises(ValueError, match="are called differently"):
        engine.Engines([one, other])


def test_what_is_no_other_size_is_an_error(made):
    compiled = engine.compile(nn.Linear(4, 3).eval(), torch.zeros(2, 4), choose="torch", shapes=2)
    for given, error, message in (
        (torch.zeros(2, 4).double(), TypeError, "must be torch.float32"),
        (torch.zeros(2, 2, 4), ValueError, "must have the shape"),
        (torch.zeros(0, 4), ValueError, "must not be empty"),
        ([1], TypeError, "must be a tensor"),
        (torch.zeros(2, 5), engine.CaptureError, "takes 4 features, and is given 5"),
    ):
        with pytest.raises(error, match=message):
            compiled(given)
    assert len(compiled.engines) == 1
    for shapes in (0, True, 1.5):
        with pytest.raises(ValueError, match="shapes must be a positive whole number"):
            engine.compile(nn.Linear(4, 3).eval(), torch.zeros(2, 4), shapes=shapes)
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="shapes is for models that are not calibrated"):
        engine.compile(nn.Linear(4, 3).eval(), x, precision="int8", calibration=[x], shapes=2)


def test_the_error_of_one_size_names_the_option():
    compiled = engine.compile(Tokens().eval(), of(5), choose="torch")
    with pytest.raises(ValueError, match=r"\(batch, 5\), got \(2, 6\).*an example of this size\), or .* with shapes=4"):
        compiled(**of(6))
