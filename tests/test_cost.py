"""Known answers are the published ones: STR's (github.com/RAIVNLab/STR), RigL's (github.com/google-research/rigl)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import cost, models
from rarefy.cost import Cost, TrainingSteps

#: Per-layer sparsities in percent; the file says where from.
BUDGETS: dict[str, Any] = json.loads((Path(__file__).parent / "data_files" / "resnet50_budgets.json").read_text())


def densities(percent_zero: dict[str, float]) -> dict[str, float]:
    return {name: 1 - percent / 100 for name, percent in percent_zero.items()}


ERK = {0.8: densities(BUDGETS["erk_80"]), 0.9: densities(BUDGETS["erk_90"])}


def uniform(network: Cost, sparsity: float, *, dense: tuple[str, ...] = ("conv1",)) -> dict[str, float]:
    return {layer.name: 1 - sparsity for layer in network.layers if layer.name not in dense}


def without_zeros(model: nn.Sequential) -> nn.Sequential:
    """The model with all parameters 1: of 25 million weights drawn at random one or two happen to be zero."""
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


@pytest.fixture(scope="module")
def resnet50_macs() -> Cost:
    return cost.count(without_zeros(models.resnet50()), torch.zeros(1, 3, 224, 224))


@pytest.fixture(scope="module")
def resnet50_rigl() -> Cost:
    # RigL's figures come from a Keras model whose first convolution was counted on an input that was padded twice: it
    # has 115x115 outputs instead of 112x112, and every later layer has the usual size.
    model = without_zeros(models.resnet50())
    assert isinstance(model.conv1, nn.Conv2d)
    model.conv1.padding = (6, 6)
    model.maxpool = nn.AdaptiveMaxPool2d(56)
    return cost.count(model, torch.zeros(1, 3, 224, 224), convention="rigl")


def small() -> nn.Sequential:
    return without_zeros(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)))


SMALL = cost.count(small(), torch.zeros(1, 3, 6, 6))


class TestPublishedInference:
    def test_resnet50_dense(self, resnet50_macs: Cost) -> None:
        assert resnet50_macs.dense == resnet50_macs.inference == 4_089_284_608
        assert resnet50_macs.pooling == 100_352
        assert resnet50_macs.parameters == resnet50_macs.nonzeros == 25_502_912
        assert resnet50_macs.parameters + resnet50_macs.other_parameters == 25_557_032
        assert (resnet50_macs.ratio, resnet50_macs.sparsity) == (1, 0)

    def test_resnet50_layers_are_those_of_str(self, resnet50_macs: Cost) -> None:
        found = [(layer.name, layer.parameters, layer.dense) for layer in resnet50_macs.layers]
        assert found == [(layer["name"], layer["params"], layer["macs"]) for layer in BUDGETS["layers"]]

    @pytest.mark.parametrize(("budget", "flops", "ratio"), [("81.27", 705.39e6, 0.1725), ("90.23", 342.70e6, 0.0838)])
    def test_str_budgets(self, resnet50_macs: Cost, budget: str, flops: float, ratio: float) -> None:
        published = BUDGETS["budgets"][budget]
        sparse = resnet50_macs.with_densities(densities(published["layer_sparsity_pct"]))
        assert sparse.inference == pytest.approx(flops, abs=0.005e6)
        assert sparse.inference == pytest.approx(published["calc_macs_incl_avgpool"], rel=1e-12)
        assert sparse.nonzeros == pytest.approx(published["calc_nnz"], rel=1e-12)
        assert sparse.ratio == pytest.approx(ratio, abs=0.00005)
        assert 100 * sparse.sparsity == pytest.approx(published["overall_sparsity_pct"], abs=0.005)
        assert sparse.dense == resnet50_macs.dense

    @pytest.mark.parametrize(("sparsity", "flops", "ratio"), [(0.8, 1692.1e6, 0.4138), (0.9, 988.9e6, 0.2418)])
    def test_erk(self, resnet50_macs: Cost, sparsity: float, flops: float, ratio: float) -> None:
        sparse = resnet50_macs.with_densities(ERK[sparsity])
        # These two figures leave the pool out.
        assert sparse.inference - sparse.pooling == pytest.approx(flops, abs=0.05e6)
        assert sparse.ratio == pytest.approx(ratio, abs=0.0001)
        assert sparse.sparsity == pytest.approx(sparsity, abs=1e-5)

    @pytest.mark.parametrize(("sparsity", "flops", "ratio"), [(0.8, 912.2e6, 0.2231), (0.9, 515.1e6, 0.1260)])
    def test_uniform_with_dense_stem(self, resnet50_macs: Cost, sparsity: float, flops: float, ratio: float) -> None:
        sparse = resnet50_macs.with_densities(uniform(resnet50_macs, sparsity))
        # These two figures leave the pool out.
        assert sparse.inference - sparse.pooling == pytest.approx(flops, abs=0.05e6)
        assert sparse.ratio == pytest.approx(ratio, abs=0.0001)

    def test_resnet50_rigl(self, resnet50_rigl: Cost) -> None:
        assert resnet50_rigl.dense == 8_202_340_776
        assert resnet50_rigl.pooling == 0
        # 32,000 steps of 4,096 samples: the "3.2e18" of the paper.
        total = cost.training_flops(resnet50_rigl, [TrainingSteps(32000)]) * 32000 * 4096
        assert total == pytest.approx(3.2253e18, rel=1e-4)

    def test_mobilenet(self) -> None:
        counted = cost.count(models.mobilenet_v1(), torch.zeros(1, 3, 224, 224))
        assert counted.dense - counted.pooling == 568_740_352
        assert counted.pooling == 50_176
        assert counted.parameters == 4_209_088

    def test_resnet18(self) -> None:
        counted = cost.count(without_zeros(models.resnet18()), torch.zeros(1, 3, 224, 224))
        assert counted.dense - counted.pooling == 1_814_073_344
        assert counted.parameters == counted.nonzeros == 11_678_912

    def test_fashion_cnn(self) -> None:
        counted = cost.count(models.fashion_cnn(), torch.zeros(1, 1, 28, 28))
        assert counted.dense - counted.pooling == 2_978_112
        assert counted.parameters == 135_312


class TestPublishedTraining:
    @pytest.mark.parametrize(
        ("kind", "sparsity", "inference", "once", "five_times"),
        [
            ("uniform", 0.8, 0.2254, 0.2279, 1.1396),
            ("erk", 0.8, 0.4153, 0.4172, 2.0861),
            ("uniform", 0.9, 0.1285, 0.1314, 0.6570),
            ("erk", 0.9, 0.2431, 0.2456, 1.2282),
        ],
    )
    def test_rigl(
        self, resnet50_rigl: Cost, kind: str, sparsity: float, inference: float, once: float, five_times: float
    ) -> None:
        sparse = uniform(resnet50_rigl, sparsity) if kind == "uniform" else ERK[sparsity]
        # Of 101 steps one computes the whole gradient, to choose the connections that grow.
        log = [TrainingSteps(100, sparse, sparse), TrainingSteps(1, sparse)]
        ratio = cost.training_ratio(resnet50_rigl, log)
        f_sparse, f_dense = resnet50_rigl.with_densities(sparse).inference, resnet50_rigl.dense
        assert ratio == pytest.approx((3 * f_sparse * 100 + 2 * f_sparse + f_dense) / 101 / (3 * f_dense), rel=1e-12)
        assert resnet50_rigl.with_densities(sparse).ratio == pytest.approx(inference, abs=0.00005)
        assert ratio == pytest.approx(once, abs=0.0001)
        assert 5 * ratio == pytest.approx(five_times, abs=0.00005)

    def test_rigl_with_a_sparse_stem(self, resnet50_rigl: Cost) -> None:
        sparse = uniform(resnet50_rigl, 0.9, dense=())
        ratio = cost.training_ratio(resnet50_rigl, [TrainingSteps(100, sparse, sparse), TrainingSteps(1, sparse)])
        assert resnet50_rigl.with_densities(sparse).ratio == pytest.approx(0.1012, abs=0.00005)
        assert 5 * ratio == pytest.approx(0.5210, abs=0.00005)

    @pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.6102), (0.9, 0.4954)])
    def test_snfs(self, resnet50_rigl: Cost, sparsity: float, published: float) -> None:
        # The momentum of every weight wants every weight's gradient: (2 f_S + f_D) / 3 f_D.
        ratio = cost.training_ratio(resnet50_rigl, [TrainingSteps(1, ERK[sparsity])])
        assert ratio == pytest.approx((2 * resnet50_rigl.with_densities(ERK[sparsity]).ratio + 1) / 3, rel=1e-12)
        assert ratio == pytest.approx(published, abs=0.00005)

    @pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.5603), (0.9, 0.5053)])
    def test_gradual_magnitude_pruning(self, resnet50_rigl: Cost, sparsity: float, published: float) -> None:
        # Cubic from step 10,000 to 25,000 of 32,000, looked at every 1,000 steps; the classifier goes to 80 % only.
        log = []
        for step in range(0, 32001, 1000):
            progress = min(max((step - 10000) / 15000, 0), 1)
            reached = 1 - (1 - progress) ** 3
            sparse = {**uniform(resnet50_rigl, sparsity * reached), "fc": 1 - 0.8 * reached}
            log.append(TrainingSteps(1000, sparse, sparse))
        ratio = cost.training_ratio(resnet50_rigl, log)
        forward = [resnet50_rigl.with_densities(record.forward).ratio for record in log]
        assert ratio == pytest.approx(math.fsum(forward) / len(forward), rel=1e-12)
        assert ratio == pytest.approx(published, abs=0.00005)

    def test_topkast(self, resnet50_rigl: Cost) -> None:
        forward = uniform(resnet50_rigl, 0.8)
        assert cost.training_ratio(resnet50_rigl, [TrainingSteps(1, forward)]) == pytest.approx(0.4836, abs=0.00005)
        backward = uniform(resnet50_rigl, 0.5)
        f_a, f_b = (resnet50_rigl.with_densities(share).ratio for share in (forward, backward))
        ratio = cost.training_ratio(resnet50_rigl, [TrainingSteps(1, forward, backward)])
        assert ratio == pytest.approx((f_a + f_a + f_b) / 3, rel=1e-12)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.unused = nn.Linear(4, 9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.proj(self.proj(input=x)) + y  # type: ignore[no-any-return]


class TestRules:
    @pytest.mark.parametrize(
        ("layer", "shape", "positions", "outputs"),
        [
            (nn.Conv1d(4, 6, 3), (4, 10), 8, 6 * 8),
            (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9, 7), 5 * 4, 6 * 20),
            (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 27, 3 * 27),
            (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 10), 10, 6 * 21),
            (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2), (4, 5, 3), 15, 6 * 60),
            (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), 27, 3 * 64),
            (nn.Linear(4, 6), (4,), 1, 6),
            (nn.Linear(4, 6), (7, 4), 7, 6 * 7),
        ],
    )
    @pytest.mark.parametrize("batch", [1, 3])
    def test_layers(
        self, layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], positions: int, outputs: int, batch: int
    ) -> None:
        example = torch.zeros(batch, *shape)
        weights = layer.weight.numel()
        (macs,) = cost.count(layer, example).layers
        (rigl,) = cost.count(layer, example, "rigl").layers
        assert (macs.dense, macs.fixed) == (positions * weights, 0)
        assert (rigl.dense, rigl.fixed) == (2 * positions * weights + outputs, outputs)
        assert (macs.kind, macs.shape) == (type(layer).__name__, tuple(layer.weight.shape))

    def test_every_call_counts_and_a_layer_that_never_runs_costs_nothing(self) -> None:
        counted = cost.count(Twice(), (torch.zeros(2, 4), torch.zeros(2, 4)))
        assert [(layer.name, layer.parameters, layer.dense) for layer in counted.layers] == [
            ("proj", 16, 32),
            ("unused", 36, 0),
        ]
        assert counted.other_parameters == 9
        assert "unused" in counted.table()

    def test_subclasses_count_as_their_base(self) -> None:
        class Pruned(nn.Linear):
            pass

        (layer,) = cost.count(Pruned(4, 3), torch.zeros(1, 4)).layers
        assert (layer.kind, layer.dense) == ("Linear", 12)

    def test_zeros_of_the_weights_are_counted(self) -> None:
        model = small()
        with torch.no_grad():
            model.get_parameter("0.weight")[:4] = 0
        counted = cost.count(model, torch.zeros(1, 3, 6, 6))
        assert [layer.nonzeros for layer in counted.layers] == [108, 1440]
        assert counted.inference == 108 * 36 + 1440
        assert counted.sparsity == pytest.approx(108 / (216 + 1440))
        assert counted.layers[0].density == 0.5

    def test_pools_count_in_macs_alone(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1))
        assert cost.count(model, torch.zeros(4, 1, 5, 5)).pooling == 50
        assert cost.count(model, torch.zeros(4, 1, 5, 5), "rigl").pooling == 0


class Two(nn.Module):
    """Takes two inputs, and an option that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(2, 3, 3), nn.Linear(4, 6)

    def forward(self, image: Tensor, words: Tensor, scale: float = 1.0) -> Tensor:
        return self.image(image).sum((2, 3)) * scale + self.words(input=words)[:, :3]


@pytest.mark.parametrize("convention", ["macs", "rigl"])
def test_keyword_arguments_are_the_positional_ones(convention: cost.Convention) -> None:
    model, image, words = Two(), torch.zeros(2, 2, 5, 5), torch.zeros(2, 4)
    found = cost.count(model, (image, words, 2.0), convention)
    assert [(layer.name, layer.parameters) for layer in found.layers] == [("image", 54), ("words", 24)]
    assert found.dense == (54 * 9 + 24 if convention == "macs" else 2 * (54 * 9 + 24) + 27 + 6)
    assert cost.count(model, {"image": image, "words": words, "scale": 2.0}, convention) == found
    assert cost.count(model, {"scale": 2.0, "words": words, "image": image}, convention) == found


class Scribbler(nn.Module):
    """Writes to its buffer, replaces another and draws random numbers, even in eval mode."""

    seen: Tensor
    latest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.latest = x[0]
        return nn.functional.dropout(self.norm(self.proj(x)), 0.5, training=True)


class TestModelIsLeftAsItWas:
    def test_modes_buffers_gradients_and_random_state(self) -> None:
        model = Scribbler()
        model.norm.eval()
        model(torch.ones(2, 4)).sum().backward()
        before = copy.deepcopy(model)
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
        buffers = dict(model.named_buffers())
        state = torch.get_rng_state()
        cost.count(model, torch.ones(3, 4))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
        for name, buffer in before.named_buffers():
            assert dict(model.named_buffers())[name] is buffers[name]
            assert torch.equal(buffers[name], buffer)
        for parameter, old, gradient in zip(model.parameters(), before.parameters(), gradients, strict=True):
            assert parameter.requires_grad
            assert torch.equal(parameter, old)
            assert gradient is not None
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
        assert not any(module._forward_hooks for module in model.modules())

    def test_after_a_forward_that_fails(self) -> None:
        model = small()
        with pytest.raises(RuntimeError):
            cost.count(model, torch.zeros(1, 5, 6, 6))
        assert all(module.training and not module._forward_hooks for module in model.modules())


class TestDensities:
    @given(st.floats(0, 1), st.floats(0, 1))
    def test_inference_is_linear_in_every_density(self, first: float, second: float) -> None:
        sparse = SMALL.with_densities({"0": first, "3": second})
        assert sparse.inference == pytest.approx(216 * 36 * first + 1440 * second)
        assert sparse.nonzeros == pytest.approx(216 * first + 1440 * second)
        assert 0 <= sparse.ratio <= 1
        assert sparse.dense == SMALL.dense

    @given(st.lists(st.tuples(st.floats(0.5, 100), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
    def test_training_is_the_mean_over_steps(self, records: list[tuple[float, float, float]]) -> None:
        log = [TrainingSteps(steps, {"0": a, "3": a}, {"0": b, "3": b}) for steps, a, b in records]
        expected = sum(steps * (2 * a + b) for steps, a, b in records) / sum(steps for steps, _, _ in records) / 3
        assert cost.training_ratio(SMALL, log) == pytest.approx(expected)
        # One record cut in two is the same run.
        halves = [
            TrainingSteps(record.steps / 2, record.forward, record.weight_gradient) for record in log for _ in "ab"
        ]
        assert cost.training_flops(SMALL, halves) == pytest.approx(cost.training_flops(SMALL, log))

    def test_layers_not_named_keep_theirs_or_train_dense(self) -> None:
        sparse = SMALL.with_densities({"0": 0.25}).with_densities({"3": 0.5})
        assert [layer.density for layer in sparse.layers] == [0.25, 0.5]
        assert cost.training_ratio(sparse, [TrainingSteps(7)]) == 1

    def test_no_weight_left(self) -> None:
        empty = cost.count(small(), torch.zeros(1, 3, 6, 6), "rigl").with_densities({"0": 0, "3": 0})
        assert empty.inference == 8 * 36 + 5
        assert empty.sparsity == 1


class TestOutput:
    def test_table_is_aligned_and_totals(self) -> None:
        lines = (
            cost.count(models.fashion_cnn(), torch.zeros(1, 1, 28, 28))
            .with_densities({"conv5": 0.1})
            .table()
            .split("\n")
        )
        assert len({len(line) for line in lines}) == 1
        assert lines[6].split() == [
            "conv5",
            "Conv2d",
            "128x64x3x3",
            "73,728",
            "10.00%",
            "1,179,648",
            "117,965",
            "10.00%",
        ]
        assert lines[-1].split() == ["total", "(macs)", "135,312", "50.96%", "2,980,160", "1,918,477", "64.37%"]

    def test_to_dict_is_json(self) -> None:
        sparse = SMALL.with_densities({"0": 0.5})
        found = json.loads(json.dumps(sparse.to_dict()))
        assert found["convention"] == "macs"
        assert found["inference"] == sparse.inference
        assert [layer["name"] for layer in found["layers"]] == ["0", "3"]
        assert found["layers"][0] == {
            "name": "0",
            "kind": "Conv2d",
            "shape": [8, 3, 3, 3],
            "parameters": 216,
            "nonzeros": 108,
            "dense": 216 * 36,
            "inference": 108 * 36,
        }


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: cost.count(small(), torch.zeros(1, 3, 6, 6), "flops"), "one of macs, rigl, got 'flops'"),  # type: ignore[arg-type]
            (lambda: cost.count(nn.Sequential(nn.ReLU()), torch.zeros(1, 3)), "Sequential has no layer to count"),
            (lambda: cost.count(small(), torch.zeros(())), "at least one sample"),
            (lambda: cost.count(small(), torch.zeros(0, 3, 6, 6)), "at least one sample"),
            (lambda: cost.count(small(), ()), "must hold a tensor"),
            (
                lambda: cost.count(nn.LayerNorm(4), torch.zeros(1, 4)),
                "no parameter of LayerNorm took part in a product",
            ),
            (lambda: cost.count(Shared(), torch.zeros(2, 4)), "'proj' ran at 3 positions for 2 samples"),
            (lambda: SMALL.with_densities({"0": 10}), r"'0' must be in \[0, 1\], got 10; .*0.1 for a sparsity of 90 %"),
            (lambda: SMALL.with_densities({"0": -0.1}), r"must be in \[0, 1\]"),
            (lambda: SMALL.with_densities({"0": math.nan}), r"must be in \[0, 1\]"),
            (lambda: SMALL.with_densities({"conv": 0.5}), "unknown layer: 'conv'; there is 0, 3"),
            (lambda: cost.training_flops(SMALL, []), "no training step"),
            (lambda: cost.training_flops(SMALL, [TrainingSteps(0)]), "no training step"),
            (lambda: cost.training_flops(SMALL, [TrainingSteps(-1)]), "must not be negative, got -1"),
            (lambda: cost.training_flops(SMALL, [TrainingSteps(1, {"7": 1})]), "unknown layer: '7'"),
        ],
    )
    def test_value_errors(self, call: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()

    def test_the_nearest_layer_is_named(self, resnet50_macs: Cost) -> None:
        with pytest.raises(ValueError, match=r"unknown layer: 'layer1\.0\.conv4'; did you mean 'layer1\.0\.conv"):
            resnet50_macs.with_densities({"layer1.0.conv4": 0.5})


class Bypass(Positions):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.proj.weight)


class Shared(Positions):
    """Work that the samples of a batch share: a projection of three positions, whatever the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() + super().forward(torch.zeros(3, 4)).sum()
