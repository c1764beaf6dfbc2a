"""The best tokens of logits, by every instruction set."""

import pytest
import torch

from rarefy.kernels import forced
from rarefy.models.best import best
from tests.engine.layers import paths


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize(("rows", "width", "count"), [(1, 1, 1), (3, 5, 5), (7, 1000, 4), (130, 8003, 8), (0, 9, 2)])
def test_they_are_those_of_log_softmax(rows, width, count, isa):
    torch.manual_seed(0)
    logits = torch.randn(rows, width) * 8
    expected, places = logits.double().log_softmax(1).topk(count, 1)
    with forced(isa):
        for given in (logits, logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :width]):
            logp, tokens = best(given, count)
            assert torch.equal(tokens, places)
            torch.testing.assert_close(logp.double(), expected, atol=2e-6, rtol=1e-6)
        assert torch.equal(best(logits.bfloat16(), count).logp, best(logits.bfloat16().float(), count).logp)


@pytest.mark.parametrize("isa", paths())
def test_numbers_far_apart(isa):
    logits = torch.full((4, 77), -torch.inf)
    logits[0, 5] = 3.0  # one alone
    logits[1, 5:7] = torch.tensor([3.0e38, -3.0e38])
    logits[2] = -1e4
    logits[3] = torch.linspace(-200, 200, 77)
    with forced(isa):
        logp, tokens = best(logits, 2)
    assert logp[:2].tolist() == [[0.0, -torch.inf], [0.0, -torch.inf]]
    assert tokens[0, 0] == tokens[1, 0] == 5
    assert tokens[3].tolist() == [76, 75]
    torch.testing.assert_close(logp[2:], logits[2:].log_softmax(1).topk(2, 1).values)


def test_what_it_does_not_take():
    for logits, count in ((torch.randn(3), 1), (torch.randn(3, 4), 0), (torch.randn(3, 4), 5)):
        with pytest.raises(ValueError, match=f"no {count} best of logits of the shape"):
            best(logits, count)
