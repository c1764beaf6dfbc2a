"""What a command's MODEL means: a run's folder or a file of weights, as a network."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


#: How many examples of a run's data int8 is calibrated with, and how many run at once.
_CALIBRATION, _BATCH = 256, 64


@dataclass(frozen=True)
class Source:
    """Weights, and what is known about their network; ``run`` is the folder they are of."""

    weights: Path
    run: Path | None


def find(path: Path) -> Source:
    """Find the weights in a run's folder, or take the file itself; raises where there are none."""
    if path.is_dir():
        weights = path / "model.safetensors"
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{path} is not a run's folder: it has no recipe.yaml")
        if not weights.is_file():
            raise FileNotFoundError(f"{path} has no model.safetensors: the run has not finished; --resume it")
        return Source(weights, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give a run's folder or a safetensors file of weights")
    return Source(path, None)


def read(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a safetensors file, sparse or not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rarefy.sparse_files import is_sparse_file, load_sparse

    try:
        return load_sparse(path) if is_sparse_file(path) else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file of weights: {error}") from error


def network(arguments: argparse.Namespace, source: Source) -> tuple[nn.Module, Tensor]:
    """Load the model with its weights, in evaluation mode, and an example input."""
    import torch

    shape = None if arguments.input is None else input_shape(arguments.input)
    if source.run is not None:
        if arguments.model is not None or arguments.set:
            raise ValueError(f"{source.run} says what its model is: leave --model and --set out")
        model, data_shape = _of_run(source.run)
        shape = shape or data_shape
    elif arguments.model is None or shape is None:
        raise ValueError(
            f"{source.weights} does not say what network it is of: add --model NAME and --input SHAPE, for example"
            " --model resnet50 --input 3,224,224"
        )
    else:
        from rarefy import models

        model = models.create(arguments.model, **model_options(arguments.set))
    state = read(source.weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source.weights} does not fit the network: {_short(str(error))}") from error
    model.float().eval()
    try:
        example = torch.zeros(1, *shape)
        with torch.no_grad():
            model(example)
    except RuntimeError as error:
        raise ValueError(f"the network does not take inputs of shape {shape}: {_short(str(error))}") from error
    return model, example


def calibration(file: Path | None, source: Source, example: Tensor) -> list[Tensor]:
    """Load what to calibrate int8 with, in batches: a file's examples, or of a run 256 of its training images."""
    import numpy as np
    import torch

    if file is None:
        if source.run is None:
            raise ValueError("--precision int8 needs --calibration FILE.npy: some hundred examples of what it will see")
        return list(torch.split(_pictures_of(source.run, _CALIBRATION), _BATCH))
    try:
        with file.open("rb") as opened:
            examples = torch.from_numpy(np.load(opened, allow_pickle=False))
    except OSError:
        raise
    except Exception as error:  # there is no end to what NumPy stumbles over in a damaged header
        raise ValueError(
            f"--calibration takes a file of numpy.save with float32 examples, {file} is none: {error}"
        ) from error
    if examples.shape[1:] != example.shape[1:] or examples.dtype is not torch.float32 or len(examples) == 0:
        raise ValueError(
            f"{file} must have examples of the shape {tuple(example.shape[1:])} in float32, behind each other: it has "
            f"{tuple(examples.shape)} of {str(examples.dtype).removeprefix('torch.')}"
        )
    return list(torch.split(examples, _BATCH))


def _of_run(run: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A run's model, freshly initialised, and the shape of its inputs."""
    from rarefy import train
    from rarefy.data import fashion_mnist
    from rarefy.train.recipe import Data, Images, build

    recipe = train.load(run / "recipe.yaml")
    if isinstance(recipe.data, Data):
        shape, classes = fashion_mnist.SHAPE, len(fashion_mnist.CLASSES)
    elif isinstance(recipe.data, Images):
        from rarefy.train.images import class_names

        shape, classes = (3, recipe.data.size, recipe.data.size), len(class_names(run))
    else:
        raise ValueError(f"{run} trained a translator, whose inputs are sentences: rarefy translate {run} runs it")
    return build(recipe.model, in_channels=shape[0], num_classes=classes), shape


def _pictures_of(run: Path, number: int) -> Tensor:
    """So many pictures of a run's training data, as its model sees them in evaluation."""
    import torch

    from rarefy import train
    from rarefy.data import fashion_mnist
    from rarefy.train.batches import normalise
    from rarefy.train.recipe import Data, Images

    recipe, dice = train.load(run / "recipe.yaml"), torch.Generator().manual_seed(0)
    if isinstance(recipe.data, Images):
        from rarefy.data import images
        from rarefy.train.image_batches import HeldOut

        assert recipe.data.folder is not None
        found = images.find(recipe.data.folder, "train")
        chosen = torch.randperm(len(found), generator=dice)[:number].tolist()
        return torch.cat([pictures for pictures, _ in HeldOut(found, recipe.data, only=chosen)])
    assert isinstance(recipe.data, Data)
    grey = fashion_mnist.load(recipe.data.folder).train_images[: recipe.data.train_size]
    return normalise(grey[torch.randperm(len(grey), generator=dice)[:number]])


def input_shape(text: str) -> tuple[int, ...]:
    """Read ``--input``: the sizes of one input; raises ValueError where it is none."""
    sizes = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", size) for size in sizes):
        raise ValueError(
            f"--input must be sizes with commas between them, below 10^9, for example 3,224,224, got {text!r:.80}"
        )
    return tuple(map(int, sizes))


def model_options(changes: list[str]) -> dict[str, Any]:
    """Read ``--set`` of a network: the options by name; raises ValueError where a value is no JSON."""
    options = {}
    for change in changes:
        key, equals, value = change.partition("=")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError) as error:
            given = f"{change!r:.80}"
            raise ValueError(f"--set takes KEY=VALUE with a number, such as num_classes=10, got {given}") from error
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, such as num_classes=10, got {change!r:.80}")
    return options


def _short(message: str) -> str:
    """In one line of a length to read."""
    line = " ".join(message.split())
    return line if len(line) <= 400 else f"{line[:400]} ..."
