"""Blocks of weights, of some outputs and some inputs, that live and die together: every method that takes them."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from rarefy.sparse.masks import block_expand, block_sum
from rarefy.sparse.registry import METHODS
from tests.sparse.by_hand import ByHand
from tests.sparse.methods import Run, assert_equal, batch

BLOCKS = [(8, 4), (2, 2), (1, 4), (4, 1)]


def takes_blocks(method: str) -> bool:
    """Whether the method has the option, and more than one value for it."""
    options = {option.name for option in dataclasses.fields(METHODS[method])}
    return "block" in options and method not in ("st3", "feather", "band")


TAKING = [method for method in sparse.list_methods() if takes_blocks(method)]


class Small:
    """A network whose layers all these blocks divide, under a method, with the steps it has taken."""

    def __init__(self, method: str, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.Flatten())
        self.model.append(nn.Linear(64, 8))
        known = {"total_steps": 24, **({"target": 0.8} if "target_flops" not in options else {})}
        self.sparsifier = sparse.create(method, self.model, **{**known, **options})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps: int) -> "Small":
        for _ in range(steps):
            x = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(self.sparsifier.steps))
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), x[:, 0, 0, :4].argmax(1)).backward()
            self.optimizer.step()
        return self

    def weights(self) -> list[torch.Tensor]:
        return [self.model[index].weight.detach() for index in (0, 2, 4)]


def whole_blocks(mask: torch.Tensor, block: tuple[int, int]) -> bool:
    """Whether each block lives or is masked as one."""
    rows, columns = block
    blocks = mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))


def test_sums_and_masks_of_blocks_by_hand():
    weight = torch.arange(16.0).view(4, 4)
    assert block_sum(weight, (2, 2)).tolist() == [[10, 18], [42, 50]]
    assert block_sum(weight, (4, 1)).tolist() == [[24, 28, 32, 36]]
    assert block_expand(torch.tensor([[True], [False]]), (2, 4)).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    kernels = torch.randn(8, 4, 3, 3)
    assert block_sum(kernels, (8, 4)).shape == (1, 1, 3, 3)
    assert torch.allclose(block_sum(kernels, (8, 4))[0, 0], kernels.sum((0, 1)), atol=1e-5)
    assert block_sum(torch.empty(0, 4), (8, 4)).shape == (0, 1)
    assert block_expand(torch.empty(0, 1), (8, 4)).shape == (0, 4)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", TAKING)
def test_blocks_live_and_die_together_and_their_number_is_exact(method, block):
    run, each = Small(method, block=block), math.prod(block)
    for _ in range(24):
        run.train(1)
        assert all(whole_blocks(mask, block) for mask in run.sparsifier.live_masks().values())
    run.sparsifier.finalize()
    masks = [weight != 0 for weight in run.weights()]
    assert all(whole_blocks(mask, block) for mask in masks)
    weights = sum(mask.numel() for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) == math.floor(0.2 * weights / each + 1e-9) * each


@pytest.mark.parametrize("method", ["gmp", "autosparse", "topk"])
def test_a_target_in_flops_is_met_in_whole_blocks(method):
    run = Small(method, block=(8, 4), target_flops=0.3, example_input=torch.zeros(1, 4, 6, 6), floor=0.0).train(24)
    run.sparsifier.finalize()
    masks = [weight != 0 for weight in run.weights()]
    assert all(whole_blocks(mask, (8, 4)) for mask in masks)
    budget = run.sparsifier.budget
    left = budget.left([int(mask.sum()) for mask in masks])
    assert 0 <= left < budget.dearest


@pytest.mark.parametrize("method", ["gmp", "set", "autosparse", "str", "topk"])
def test_a_run_in_blocks_goes_on_to_the_same_bits(method):
    whole, first = Small(method, block=(8, 4)).train(24), Small(method, block=(8, 4)).train(11)
    state = {"model": first.model.state_dict(), "sparsifier": first.sparsifier.state_dict()}
    other = Small(method, block=[8, 4])
    other.model.load_state_dict(state["model"])
    other.optimizer.load_state_dict(first.optimizer.state_dict())
    other.sparsifier.load_state_dict(state["sparsifier"])
    other.train(13)
    assert_equal(other.sparsifier.state_dict(), whole.sparsifier.state_dict())
    assert_equal(other.model.state_dict(), whole.model.state_dict())
    with pytest.raises(ValueError, match="block"):
        Small(method, block=4).sparsifier.load_state_dict(state["sparsifier"])


@pytest.mark.parametrize("method", ["gmp", "autosparse", "set"])
def test_four_is_short_for_one_output_and_four_inputs(method):
    short, pair = (Small(method, block=block).train(24) for block in (4, (1, 4)))
    assert_equal(short.sparsifier.state_dict(), pair.sparsifier.state_dict())
    assert_equal(short.model.state_dict(), pair.model.state_dict())


@pytest.mark.parametrize("method", ["topk", "autosparse"])
def test_of_equal_blocks_the_first_live(method):
    run = ByHand(method, torch.full((16, 8), 0.5), target=0.75, total_steps=10, block=(8, 4), floor=0.0)
    run.rest(10)
    run.sparsifier.finalize()
    used = run.model[0].weight.detach() != 0
    assert used[:8, :4].all()
    assert int(used.sum()) == 32


def test_autosparse_thresholds_blocks_of_outputs_by_their_mean():
    # T = 1/2; the means of the two blocks of two outputs are 1 and 0.3
    weight = [[2.0, -1.0, 0.5, -0.5], [1.0, 0.0, 0.1, 0.1]]
    options = {"alpha": 0.5, "anneal": "constant", "pressure": 0.0, "floor": 0.0}
    run = ByHand("autosparse", weight, lr=0.01, total_steps=1000, block=(2, 2), **options)
    run.put("own.s", 0.0)
    assert run.model[0].weight.tolist() == [[1.0, -0.5, 0, 0], [0.5, 0, 0, 0]]
    run.step()
    assert run.gradient.tolist() == [[1, 1, 0.5, 0.5]] * 2
    # s - lr / sqrt(4) dL/ds, dL/ds = -g'(0) (sum of W/B over the first block + alpha * that of the second)
    assert run.kept("own.s").item() == pytest.approx(0.01 / 2 * 0.25 * (2.0 + 0.5 * 0.2 / 0.3))


def test_floors_are_in_whole_blocks():
    # A tenth of 1,024 weights are 102.4: four blocks of 32.
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight.data.mul_(1e-3)
    sparsifier = sparse.create(
        "topk", model, target=0.8, total_steps=10, block=(8, 4), floor=0.1, distribution="global"
    )
    assert [layer.live for layer in sparsifier.layers()] == [32 * (math.floor(0.2 * 2048 / 32) - 4), 32 * 4]
    with pytest.raises(ValueError, match=r"target=0\.9 cannot be reached: the floors.*0\.125 of the network"):
        sparse.create(
            "autosparse", nn.Sequential(nn.Linear(32, 32)), target=0.9, total_steps=10, block=(8, 4), floor=0.1
        )


RAGGED = {
    "outputs": ({"block": (8, 4)}, r"layer 'b' has 10 outputs, which blocks of 8x4 do not.*exclude=\['b'\]"),
    "inputs": ({"block": (2, 3)}, r"layer 'a' has 16 inputs.*blocks of 2x3 do not divide; pass exclude=\['a', 'b'\]"),
    "neither": ({"block": (3, 5)}, r"layer 'a' has 16 inputs.*pass exclude=\['a', 'b'\]"),
    "zero": ({"block": (0, 4)}, r"block must be a positive whole number of inputs.* got \(0, 4\)"),
    "three": ({"block": (1, 2, 2)}, r"block must be .* got \(1, 2, 2\)"),
    "text": ({"block": "8x4"}, r"block must be .* or of outputs and of inputs, such as \(8, 4\), got the text '8x4'"),
    "share": ({"block": 0.5}, r"block must be .* got 0\.5"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["gmp", "autosparse", "topk"])
@pytest.mark.parametrize(("options", "message"), RAGGED.values(), ids=RAGGED)
def test_what_blocks_do_not_divide_is_told_before_any_work(method, options, message):
    model = nn.ModuleDict({"a": nn.Conv2d(16, 16, 3), "b": nn.Linear(16, 10)})
    with pytest.raises(ValueError, match=message):
        sparse.create(method, model, target=0.5, total_steps=20, **options)


def test_blocks_of_outputs_share_a_threshold():
    with pytest.raises(ValueError, match=r"granularity='channel' has a threshold for each output, and block=\(8, 4\)"):
        sparse.create("str", nn.Linear(16, 16), total_steps=10, block=(8, 4), granularity="channel")
    sparse.create("str", nn.Linear(16, 16), total_steps=10, block=(1, 4), granularity="channel")
    with pytest.raises(ValueError, match="backward_density chooses single weights"):
        sparse.create("autosparse", nn.Linear(16, 16), total_steps=10, block=(8, 1), backward_density=0.5)


@pytest.mark.parametrize("block", [4, (1, 4), [1, 4]])
def test_thresholds_of_single_weights_take_no_blocks(block):
    for method in ("st3", "feather", "band"):
        with pytest.raises(ValueError, match="thresholds single weights: leave block out"):
            sparse.create(method, nn.Linear(16, 16), target=0.5, total_steps=20, block=block)


def test_blocks_take_a_network_without_changing_its_dense_weights():
    run = Run("autosparse-block", total_steps=60).train(60)
    dense = run.sparsifier.dense_weights()
    for name, mask in run.sparsifier.live_masks().items():
        assert whole_blocks(mask, (2, 4)), name
        assert (dense[name][~mask] != 0).any()


def test_thresholds_of_large_blocks_follow_the_curve():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2))
    model.extend([nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8)])
    options = {"target": 0.9, "total_steps": 120, "block": (8, 4), "exclude": ["0"]}
    sparsifier = sparse.create("autosparse", model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    for step in range(96):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        # At first all blocks are of one size, and the thresholds pass most of them at once where nothing steers them.
        assert 0.7 < (1.0 - sparsifier.sparsity()) / sparsifier.aim() < 1.4, step
