"""Synthetic run folders in the form that a training writes, each from a seeded generator."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

WriteRun = Callable[..., Path]


def resnet_layers(blocks: tuple[int, ...], widths: tuple[int, ...], bottleneck: bool) -> list[dict[str, Any]]:
    """Names, shapes and MACs in the manner of a ResNet: 20 layers for (3, 3, 3), 54 for (3, 4, 6, 3) bottlenecks."""
    layers = [{"name": "conv1", "kind": "Conv2d", "shape": [widths[0], 3, 3, 3], "area": 32 * 32}]
    before = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        area = (32 // 2 ** (stage - 1)) ** 2
        out = 4 * width if bottleneck else width
        for block in range(count):
            shapes = [[width, before, 1, 1], [width, width, 3, 3], [out, width, 1, 1]]
            if not bottleneck:
                shapes = [[width, before, 3, 3], [width, width, 3, 3]]
            for i, shape in enumerate(shapes, start=1):
                layers.append({"name": f"layer{stage}.{block}.conv{i}", "kind": "Conv2d", "shape": shape, "area": area})
            if bottleneck and block == 0:
                name = f"layer{stage}.{block}.downsample.0"
                layers.append({"name": name, "kind": "Conv2d", "shape": [out, before, 1, 1], "area": area})
            before = out
    layers.append({"name": "fc", "kind": "Linear", "shape": [10, before], "area": 1})
    return layers


NETWORKS = {
    "resnet20": resnet_layers((3, 3, 3), (16, 32, 64), bottleneck=False),
    "small": resnet_layers((1,), (16,), bottleneck=False),
    "resnet50": resnet_layers((3, 4, 6, 3), (64, 128, 256, 512), bottleneck=True),
}


def write_run(
    folder: Path,
    *,
    model: str = "resnet20",
    dense: bool = False,
    finished: bool = True,
    name: str | None = None,
    rename: dict[str, str] | None = None,
    epochs: int = 30,
    steps_per_epoch: int = 40,
    seed: int = 0,
) -> Path:
    """A run of `epochs`, half of them if it is not to be finished."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    name = name or ("dense" if dense else "autosparse-90")
    layers = [{**layer, "name": (rename or {}).get(layer["name"], layer["name"])} for layer in NETWORKS[model]]
    method: dict[str, Any] = {"name": "dense"} if dense else {"name": "autosparse", "target": 0.9, "alpha": 0.75}
    recipe = {
        "name": name,
        "seed": seed,
        "data": {"name": "fashion_mnist"},
        "model": {"name": model, "classes": 10},
        "method": method,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"epochs": epochs, "batch_size": 128},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {
        "rarefy": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11.7",
        "platform": "Linux x86_64",
        "cpu": "a CPU of 16 cores",
        "threads": 16,
        "native_isa": "avx512",
        "date": "2026-03-01T12:00:00Z",
        "command": f"rarefy train recipes/{name}.yaml",
    }
    (folder / "environment.json").write_text(json.dumps(environment))

    sizes = np.array([np.prod(layer["shape"]) for layer in layers], dtype=float)
    macs = sizes * [layer["area"] for layer in layers]
    final = np.clip(0.1 * (sizes.mean() / sizes) ** 0.35 * random.uniform(0.6, 1.4, len(layers)), 0.03, 1.0)
    first = random.uniform(0.72, 0.95, len(layers))
    last = random.uniform(0.02, 0.3, len(layers))
    records: list[dict[str, Any]] = []
    done = epochs if finished else epochs // 2
    accuracy = 0.0
    densities = np.ones(len(layers))
    for step in range(1, done * steps_per_epoch + 1):
        progress = step / (epochs * steps_per_epoch)
        ramp = 1 - (1 - min(progress / 0.6, 1)) ** 3
        densities = np.ones(len(layers)) if dense else first + (final - first) * ramp
        sparsity = float(1 - (densities * sizes).sum() / sizes.sum())
        ratio = float((densities * macs).sum() / macs.sum())
        thresholds = 0.0067 * (last / 0.0067) ** ramp
        alpha = 0.75 * 0.5 * (1 + np.cos(np.pi * np.floor(progress * epochs) / epochs)) if progress < 0.7 else 0.0
        gradients = 1.0 if alpha else ratio
        if step % 10 == 0:
            record: dict[str, Any] = {
                "event": "train",
                "step": step,
                "epoch": step / steps_per_epoch,
                "loss": 0.25 + 1.9 * np.exp(-9 * progress) + random.normal(0, 0.04),
                "learning_rate": 0.1,
                "inference_flops_ratio": ratio,
                "seconds": step * 0.02,
                "alpha": None,
                "sparsity": None,
                "target_sparsity": None,
                "layers": [],
            }
            if not dense:
                columns = zip(layers, densities, thresholds, strict=True)
                record |= {
                    "alpha": alpha,
                    "sparsity": sparsity,
                    "target_sparsity": 0.9 * ramp,
                    "layers": [
                        {"name": layer["name"], "density": d, "threshold": t, "weight_grad_density": gradients}
                        for layer, d, t in columns
                    ],
                }
            records.append(record)
        if step % steps_per_epoch == 0:
            accuracy = (0.925 if dense else 0.921) - 0.3 * np.exp(-9 * progress) + random.normal(0, 0.002)
            records.append(
                {
                    "event": "eval",
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "test_accuracy": accuracy,
                    "test_loss": 0.3 + 1.2 * np.exp(-9 * progress),
                    "sparsity": 0.0 if dense else sparsity,
                    "inference_flops_ratio": ratio,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if not finished:
        return folder

    nonzeros = np.round(densities * sizes)
    outside = 1000  # norms and biases
    summary = {
        "name": name,
        "method": method["name"],
        "model": model,
        "data": "fashion_mnist",
        "target": None if dense else 0.9,
        "target_kind": None if dense else "sparsity",
        "test_accuracy": accuracy,
        "best_test_accuracy": accuracy + 0.001,
        "sparsity": 1 - nonzeros.sum() / sizes.sum(),
        "inference_flops_ratio": (densities * macs).sum() / macs.sum(),
        "training_flops_ratio": 1.0 if dense else 0.46,
        "dense_flops": int(macs.sum()),
        "inference_flops": int(np.floor(densities * macs).sum()),
        "parameters": int(sizes.sum()) + outside,
        "nonzeros": int(nonzeros.sum()) + outside,
        "convention": "macs",
        "seconds": 321.0 if dense else 365.2,
        "epochs": epochs,
        "steps": epochs * steps_per_epoch,
        "seed": seed,
        "layers": [
            {
                "name": layer["name"],
                "kind": layer["kind"],
                "shape": layer["shape"],
                "parameters": int(sizes[i]),
                "nonzeros": int(nonzeros[i]),
                "density": densities[i],
                "dense_flops": int(macs[i]),
                "inference_flops": int(densities[i] * macs[i]),
                "initial_density": None if dense else first[i],
                "threshold": None if dense else last[i],
            }
            for i, layer in enumerate(layers)
        ],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if dense:
        return folder
    histograms = []
    for layer, size, density in zip(layers, sizes, densities, strict=True):
        weights = np.abs(random.laplace(0, 0.05, int(min(size, 50_000))))
        counts, edges = np.histogram(weights, bins=40)
        threshold = float(np.quantile(weights, 1 - density))
        histograms.append(
            {"name": layer["name"], "edges": edges.tolist(), "counts": counts.tolist(), "threshold": threshold}
        )
    (folder / "histograms.json").write_text(json.dumps({"layers": histograms}))
    return folder


@pytest.fixture(scope="session")
def make_run() -> WriteRun:
    """The writer itself: a folder that is not there yet, then what is to be special about the run."""
    return write_run


@pytest.fixture(scope="session")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished AutoSparse run of a network of 20 layers; read it, do not change it."""
    return write_run(tmp_path_factory.mktemp("report") / "sparse")


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense run beside it."""
    return write_run(tmp_path_factory.mktemp("report") / "dense", dense=True, seed=1)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network of 4 layers, quick to draw."""
    return write_run(tmp_path_factory.mktemp("report") / "small", model="small", epochs=4)


@pytest.fixture(scope="session")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network of 54 layers."""
    return write_run(tmp_path_factory.mktemp("report") / "large", model="resnet50", epochs=10)
