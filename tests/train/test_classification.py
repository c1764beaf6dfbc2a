"""What a run does, writes and refuses."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rarefy import cost, models
from rarefy._names import layer_name
from rarefy.train import Classification, TrainingDivergedError, TrainingInterruptedError, classification, load
from rarefy.train.batches import normalise
from rarefy.train.optimizer import learning_rate
from tests.train.runs import (
    AUTOSPARSE,
    BATCH,
    EPOCHS,
    STEPS,
    digest,
    outcome,
    recipe,
    records,
    run,
    stop_at,
    synthetic,
    use_model,
    without_norm,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoSparse run that leaves one layer dense; read it, do not change it."""
    from tests.train.runs import prepare

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        torch.set_num_threads(1)
        run(recipe(method={"name": "autosparse", "target": 0.8, "exclude": ["conv1"]}), folder)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def test_the_folder_of_a_run(finished: Path) -> None:
    found = sorted(
        str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and "tfevents" not in p.name
    )
    assert found == [
        *("checkpoints/best.pt", "checkpoints/last.pt", "environment.json", "histograms.json", "metrics.jsonl"),
        *("model.safetensors", "recipe.yaml", "summary.json"),
    ]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert load(finished / "recipe.yaml").method.options["target"] == 0.8
    about = json.loads((finished / "environment.json").read_text())
    assert {"rarefy", "torch", "python", "cpu", "threads", "native_isa", "processes", "date"} <= about.keys()


def test_the_summary_says_what_the_model_is(finished: Path) -> None:
    summary, tensors = summary_of(finished), load_file(finished / "model.safetensors")
    sparsified = [layer for layer in summary["layers"] if layer["threshold"] is not None]
    assert [layer["name"] for layer in summary["layers"]] == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"]
    assert [layer["name"] for layer in sparsified] == ["conv2", "conv3", "conv4", "conv5", "fc"]

    zeros = sum(int((tensors[f"{layer['name']}.weight"] == 0).sum()) for layer in sparsified)
    weights = sum(tensors[f"{layer['name']}.weight"].numel() for layer in sparsified)
    assert summary["sparsity"] == pytest.approx(zeros / weights, abs=1e-12)
    assert abs(summary["sparsity"] - 0.8) < 1e-3
    for layer in summary["layers"]:
        weight = tensors[f"{layer['name']}.weight"]
        assert layer["shape"] == list(weight.shape)
        assert (layer["parameters"], layer["nonzeros"]) == (weight.numel(), int(weight.count_nonzero()))
        assert layer["density"] == layer["nonzeros"] / layer["parameters"]

    model = models.create("fashion_cnn")
    model.load_state_dict(tensors)  # strictly
    images = normalise(synthetic().test_images)
    counted = cost.count(model, images[:1])
    assert summary["inference_flops_ratio"] == counted.ratio
    assert (summary["dense_flops"], summary["inference_flops"]) == (counted.dense, counted.inference)
    assert (summary["parameters"], summary["nonzeros"]) == (counted.parameters, counted.nonzeros)
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == synthetic().test_labels).float().mean().item()
    assert summary["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert summary["best_test_accuracy"] >= summary["test_accuracy"] > 0.15  # chance gives 0.1; it is a very short run
    assert {k: summary[k] for k in ("name", "method", "model", "data", "target", "target_kind", "epochs", "steps")} == {
        **{"name": "test", "method": "autosparse", "model": "fashion_cnn", "data": "fashion_mnist"},
        **{"target": pytest.approx(0.8), "target_kind": "sparsity", "epochs": EPOCHS, "steps": STEPS},
    }


def test_the_metrics(finished: Path) -> None:
    found = records(finished)
    assert [r["step"] for r in found if r["event"] == "train"] == [0, 3, 5, 6, 9, 10, 12, 15]
    assert [(r["step"], r["epoch"]) for r in found if r["event"] == "eval"] == [(5, 1.0), (10, 2.0), (15, 3.0)]
    seconds = [r["seconds"] for r in found if r["event"] == "train"]
    assert seconds == sorted(seconds)
    assert found[0]["loss"] is None
    assert all(math.isfinite(r["loss"]) for r in found[1:] if r["event"] == "train")


def test_training_flops_are_the_mean_over_the_metrics(finished: Path) -> None:
    summary = summary_of(finished)
    flops = {layer["name"]: layer["dense_flops"] for layer in summary["layers"]}
    pooling = summary["dense_flops"] - sum(flops.values())
    total, trained = 0.0, [r for r in records(finished) if r["event"] == "train"]
    for record, following in itertools.pairwise(trained):
        forward = {layer["name"]: layer["density"] for layer in record["layers"]}
        gradient = {layer["name"]: layer["weight_grad_density"] for layer in record["layers"]}
        step = 3 * pooling
        for name, dense in flops.items():
            step += dense * (2 * forward.get(name, 1.0) + gradient.get(name, 1.0))
        total += step * (following["step"] - record["step"])
    by_hand = total / trained[-1]["step"] / (3 * summary["dense_flops"])
    assert summary["training_flops_ratio"] == pytest.approx(by_hand, rel=1e-12)
    assert summary["inference_flops_ratio"] < by_hand < 1


def test_a_dense_run(tmp_path: Path) -> None:
    summary = run(recipe(), tmp_path)
    assert (summary["sparsity"], summary["inference_flops_ratio"], summary["training_flops_ratio"]) == (0.0, 1.0, 1.0)
    assert summary["target"] is None
    assert not (tmp_path / "histograms.json").exists()
    assert all(layer["threshold"] is None and layer["density"] == 1.0 for layer in summary["layers"])


def test_runs_repeat_and_seeds_differ(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run(recipe(seed=seed), tmp_path / name)
    one, same, other = (outcome(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one["model"] != other["model"]


def test_channels_last_and_accumulation_only_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, without_norm)
    losses = {}
    for name, changes in {
        "usual": {},
        "contiguous": {"channels_last": False},
        "accumulated": {"schedule": {"accumulate": 4}},
        "all apart": {"schedule": {"accumulate": BATCH}},
    }.items():
        summary = run(recipe(**changes, **AUTOSPARSE), tmp_path / name)
        losses[name] = [summary["test_loss"], *(r["loss"] for r in records(tmp_path / name)[1:] if "loss" in r)]
    for other in ("contiguous", "accumulated", "all apart"):
        torch.testing.assert_close(losses[other], losses["usual"], rtol=1e-3, atol=0)


def test_one_accumulated_step_is_the_step_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, without_norm)
    weights = []
    for accumulate in (1, 2, 8):
        made = Classification(recipe(schedule={"accumulate": accumulate}), tmp_path / str(accumulate))
        before = made.plain_model[0].weight.detach().clone()  # type: ignore[index, union-attr]
        with pytest.raises(TrainingInterruptedError):
            made.train(stop_at(1))
        weights.append({key: value.clone() for key, value in made.plain_model.state_dict().items()})
        assert not torch.equal(before, weights[-1]["0.weight"])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-7)


def test_evaluation_does_not_depend_on_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Classification(recipe(), tmp_path)
    accuracy, loss = made._checked_metrics().values()
    monkeypatch.setattr(classification, "EVALUATION_BATCH", 7)
    same, close = made._checked_metrics().values()
    assert accuracy == same
    assert close == pytest.approx(loss, rel=1e-6)


def test_the_best_of_a_targeted_run_is_within_its_budget(finished: Path) -> None:
    best = torch.load(finished / "checkpoints" / "best.pt", weights_only=True)
    evals = {r["step"]: r for r in records(finished) if r["event"] == "eval"}
    assert evals[best["step"]]["sparsity"] > 0.79
    assert best["best"] == evals[best["step"]]["test_accuracy"]


# Learning rate


def test_the_learning_rate_rises_on_a_line_and_falls_on_half_a_cosine() -> None:
    rates = [learning_rate(step, 4, 20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0.0, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(0, 0, 10) == 1.0
    assert 0 < learning_rate(9, 0, 10) < 0.03


def test_the_learning_rate_of_every_step(tmp_path: Path) -> None:
    made = Classification(recipe(schedule={"warmup_epochs": 1}, **AUTOSPARSE), tmp_path)
    rates = []
    made.train(lambda seen: rates.append([group["lr"] for group in made.optimizer.param_groups]))  # type: ignore[func-returns-value]
    for step, groups in enumerate(rates):
        assert groups == pytest.approx([0.05 * learning_rate(step, 5, STEPS)] * 2)


def test_vectors_have_a_weight_decay_of_their_own(tmp_path: Path) -> None:
    decays = {"weight_decay": 0.01, "norm_weight_decay": 0.002}
    for method in ({"name": "dense"}, AUTOSPARSE["method"]):
        made = Classification(recipe(optimizer=decays, method=method), tmp_path)
        of = {id(p): group for group in made.optimizer.param_groups for p in group["params"]}
        assert len(made.optimizer.param_groups) == 2
        assert len(of) == len(list(made.plain_model.parameters()))
        for name, parameter in made.plain_model.named_parameters():
            expected = 0.002 if name.startswith("bn") else 0.01
            assert of[id(parameter)]["weight_decay"] == expected, name


# What stops a run


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_is_from_before(tmp_path: Path) -> None:
    made = Classification(recipe(), tmp_path)

    def poison(seen: Any) -> bool:
        if seen.step == 7:
            with torch.no_grad():
                made.plain_model.fc.weight[0, 0] = math.nan  # type: ignore[union-attr, index, operator]
        return False

    with pytest.raises(TrainingDivergedError, match=r"the loss is nan at step 9 \(epoch 1.80\); a lower optimizer.lr"):
        made.train(poison)
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (tmp_path / "summary.json").exists()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("moment", ["end of an epoch", "stop"])
def test_weights_that_broke_in_the_last_step_are_not_saved(moment: str, tmp_path: Path) -> None:
    made = Classification(recipe(), tmp_path)
    usual, at = made._optimizer_step, {"end of an epoch": 10, "stop": 7}[moment]

    def broken(micro_batches: Any) -> None:
        usual(micro_batches)
        if made.step == at:
            with torch.no_grad():
                made.plain_model.bn2.bias[3] = math.inf  # type: ignore[union-attr, index, operator]

    made._optimizer_step = broken  # type: ignore[method-assign]
    what = {"end of an epoch": "the test loss is nan at step 10", "stop": "a number in bn2.bias is nan at step 7"}[
        moment
    ]
    with pytest.raises(TrainingDivergedError, match=what):
        made.train(stop_at(7) if moment == "stop" else None)
    checkpoints = tmp_path / "checkpoints"
    for path in checkpoints.iterdir() if checkpoints.exists() else ():
        state = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in state["model"].values())
        assert state["step"] == 5


def test_a_learning_rate_far_too_high_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="a lower optimizer.lr"):
        run(recipe(optimizer={"lr": 1e30}), tmp_path)


# What is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "autosparse", "target": 90}}, r"target must be in \(0, 1\), got 90.*; for 90 % write 0.9"),
        ({"method": {"name": "autosparse", "target": 0.9, "floor": 0.5}}, "target=0.9 cannot be reached"),
        ({"method": {"name": "autosparse", "policy": "cost"}}, "policy='cost' needs a target"),
        ({"method": {"name": "str", "exclude": ["conv9"]}}, "in exclude: 'conv9'; did you mean"),
        ({"method": {"name": "autosparse", "target": 0.9, "target_flops": 0.1}}, "not both"),
        ({"data": {"train_size": 161}}, "data.train_size must be at most 160, got 161"),
        ({"schedule": {"batch_size": 161}}, "schedule.batch_size=161 is more than the 160 training images"),
        (
            {"model": {"name": "resnet20", "num_classes": 7}},
            r"resnet20 gives \(7,\) numbers an image, but .* has 10 classes",
        ),
        ({"model": {"name": "resnet20", "in_channels": 3}}, r"resnet20 does not take images of shape \(1, 12, 12\)"),
        ({"model": {"name": "resnet50"}}, r"resnet50 does not take images of shape \(1, 12, 12\)"),
        ({"precision": "fp16"}, "precision: fp16 does not run on cpu; take bf16 or fp32"),
    ],
)
def test_bad_input_leaves_no_folder(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(recipe(**changes), tmp_path / "runs" / "bad")
    assert not (tmp_path / "runs").exists()


def test_a_model_gets_the_channels_and_classes_of_the_data(tmp_path: Path) -> None:
    made = Classification(recipe(model={"name": "resnet20", "width": 4}), tmp_path)
    convolutions = [m for m in made.plain_model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions[0].in_channels == 1


def test_the_initial_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    found = []
    for method in ({"name": "dense"}, {"name": "str"}):
        torch.rand(3)
        made = Classification(recipe(method=method), tmp_path)
        dense = {} if made.sparsifier is None else made.sparsifier.dense_weights()
        found.append({key: digest(dense.get(layer_name(key), p)) for key, p in made.plain_model.named_parameters()})
    assert found[0] == found[1]
