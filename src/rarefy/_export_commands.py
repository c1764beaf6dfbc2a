"""``rarefy export``; light to import, the work is in rarefy.onnx_files, rarefy.sparse_files and rarefy.engine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy._outputs import check_file

if TYPE_CHECKING:
    from torch import Tensor, nn

_SUFFIXES = {"engine": ".engine", "onnx": ".onnx", "safetensors": ".sparse.safetensors"}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    export = commands.add_parser(
        "export",
        help="write a trained model for another runtime, or small",
        description="Write a finalized model as ONNX, checked in onnxruntime, compiled for this CPU, or its weights as"
        " sparse safetensors.",
        epilog="examples: rarefy export runs/demo --to onnx; rarefy export resnet.safetensors --to onnx --model"
        " resnet50 --input 3,224,224; rarefy export weights.safetensors --to safetensors",
    )
    export.add_argument("source", type=Path, metavar="MODEL", help="a run's folder, or a safetensors file of weights")
    export.add_argument("--to", required=True, choices=sorted(_SUFFIXES), help="what to write")
    export.add_argument("--output", type=Path, metavar="PATH", help="the file; default beside the weights")
    export.add_argument("--model", metavar="NAME", help="of a file of weights, its network: resnet50, ...")
    export.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of that network: num_classes=10"
    )
    export.add_argument(
        "--input", metavar="SHAPE", help="of one input, without the batch: 3,224,224; default what the run's data has"
    )
    export.add_argument("--weights", choices=("float32", "bfloat16"), help="how an engine stores them; default float32")
    export.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    export.set_defaults(command=_export)


@dataclass(frozen=True)
class _Source:
    """Weights, and what is known about their network; ``run`` is the folder they are of."""

    weights: Path
    run: Path | None


def _export(arguments: argparse.Namespace) -> int:
    source = _find(arguments.source)
    target = arguments.output or source.weights.with_name(source.weights.stem + _SUFFIXES[arguments.to])
    if target.is_dir() or (target.exists() and target.samefile(source.weights)):
        raise ValueError(f"cannot write to {target}, which is {'a folder' if target.is_dir() else 'the weights'}")
    check_file(target, "--output")
    if arguments.weights is not None and arguments.to != "engine":
        raise ValueError(f"--weights is of engines: leave it out with --to {arguments.to}")
    result: dict[str, Any] = {"file": str(target)}
    if arguments.to == "safetensors":
        from rarefy.sparse_files import save_sparse

        state = _read(source.weights)
        save_sparse(state, target)
    elif arguments.to == "engine":
        from rarefy import engine

        model, example = _network(arguments, source)
        state = model.state_dict()
        compiled = engine.compile(model, example, weights=arguments.weights or "float32")
        engine.save(compiled, target)
        result |= {"seconds": compiled.report.seconds, "chosen": compiled.report.chosen}
    else:
        from rarefy import onnx_files

        onnx_files.require_exporter()
        model, example = _network(arguments, source)
        state = model.state_dict()
        result["difference"] = onnx_files.save_onnx(model, example, target)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    result |= {
        "bytes": target.stat().st_size,
        "dense_bytes": sum(tensor.nbytes for tensor in state.values()),
        "weights": sum(tensor.numel() for tensor in weights),
        "nonzeros": sum(int(tensor.count_nonzero()) for tensor in weights),
    }
    _print(result, arguments.json)
    return 0


def _find(path: Path) -> _Source:
    if path.is_dir():
        weights = path / "model.safetensors"
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{path} is not a run's folder: it has no recipe.yaml")
        if not weights.is_file():
            raise FileNotFoundError(f"{path} has no model.safetensors: the run has not finished; --resume it")
        return _Source(weights, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give a run's folder or a safetensors file of weights")
    return _Source(path, None)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a safetensors file, sparse or not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rarefy.sparse_files import is_sparse_file, load_sparse

    try:
        return load_sparse(path) if is_sparse_file(path) else load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file of weights: {error}") from error


def _network(arguments: argparse.Namespace, source: _Source) -> tuple[nn.Module, Tensor]:
    """The model with its weights, in evaluation mode, and an example input."""
    import torch

    shape = None if arguments.input is None else _shape(arguments.input)
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

        model = models.create(arguments.model, **_options(arguments.set))
    state = _read(source.weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source.weights} does not fit the network: {_short(str(error))}") from error
    model, example = model.float().eval(), torch.zeros(1, *shape)
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError as error:
        raise ValueError(f"the network does not take inputs of shape {shape}: {_short(str(error))}") from error
    return model, example


def _of_run(run: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A run's model, freshly initialised, and the shape of its inputs."""
    from rarefy import train
    from rarefy.data import fashion_mnist
    from rarefy.train.recipe import build

    recipe = train.load(run / "recipe.yaml")
    shape = fashion_mnist.SHAPE
    return build(recipe.model, in_channels=shape[0], num_classes=len(fashion_mnist.CLASSES)), shape


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input must be sizes with commas between them, for example 3,224,224, got {text!r}")
    return tuple(map(int, sizes))


def _options(changes: list[str]) -> dict[str, Any]:
    options = {}
    for change in changes:
        key, equals, value = change.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--set takes KEY=VALUE with a number, such as num_classes=10, got {change!r}") from error
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, such as num_classes=10, got {change!r}")
    return options


def _short(message: str) -> str:
    """In one line of a length to read."""
    line = " ".join(message.split())
    return line if len(line) <= 400 else f"{line[:400]} ..."


def _print(result: dict[str, Any], as_json: bool) -> None:
    unchecked = "difference" in result and result["difference"] is None
    if unchecked:
        print("not checked: onnxruntime is not installed (pip install 'rarefy[export]')", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
        return
    share = 100 * (1 - result["nonzeros"] / max(result["weights"], 1))
    rows = [
        ("file", result["file"]),
        ("size", f"{result['bytes']:,} bytes; the weights dense {result['dense_bytes']:,}"),
        ("zeros", f"{share:.2f} % of {result['weights']:,} weights"),
    ]
    if "difference" in result and not unchecked:
        rows.append(("checked", f"onnxruntime differs by {result['difference']:.1e} of the largest output"))
    if "chosen" in result:
        rows.append(("runs in", f"{result['chosen']}, chosen in {result['seconds']:.1f} s"))
    for name, value in rows:
        print(f"{name:>8}  {value}")
