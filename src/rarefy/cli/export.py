"""``rarefy export``; light to import, the work is in rarefy.onnx_files, rarefy.sparse_files and rarefy.engine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rarefy.cli import models, options
from rarefy.cli.outputs import check_file

_SUFFIXES = {"engine": ".engine", "onnx": ".onnx", "safetensors": ".sparse.safetensors"}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    export = commands.add_parser(
        "export",
        help="write a trained model for another runtime, or small",
        description="Write a finalized model as ONNX, checked in onnxruntime, compiled for this CPU, or its weights as"
        " sparse safetensors.",
        epilog="examples: rarefy export runs/demo --to onnx; rarefy export resnet.safetensors --to onnx --model"
        " resnet50 --input 3,224,224; rarefy export runs/demo --to onnx --precision int8",
    )
    export.add_argument("source", type=Path, metavar="MODEL", help="a run's folder, or a safetensors file of weights")
    export.add_argument("--to", required=True, choices=sorted(_SUFFIXES), help="what to write")
    export.add_argument("--output", type=Path, metavar="PATH", help="the file; default beside the weights")
    options.add_model(export)
    export.add_argument(
        "--input", metavar="SHAPE", help="of one input, without the batch: 3,224,224; default what the run's data has"
    )
    export.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="bfloat16: of an engine's weights; int8: of an engine or ONNX, quantised after training; default float32",
    )
    export.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for int8, a file of numpy.save with some hundred examples; by custom a run's training images",
    )
    options.add_json(export)
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    source = models.find(arguments.source)
    target = arguments.output or source.weights.with_name(source.weights.stem + _SUFFIXES[arguments.to])
    if target.is_dir() or (target.exists() and target.samefile(source.weights)):
        raise ValueError(f"cannot write to {target}, which is {'a folder' if target.is_dir() else 'the weights'}")
    check_file(target, "--output")
    possible = {"engine": ("float32", "bfloat16", "int8"), "onnx": ("float32", "int8")}.get(arguments.to, ("float32",))
    if arguments.precision not in possible:
        raise ValueError(f"--to {arguments.to} writes {' or '.join(possible)}, not {arguments.precision}")
    if arguments.calibration is not None and arguments.precision != "int8":
        raise ValueError(f"--calibration is for --precision int8, got {arguments.precision}")
    result: dict[str, Any] = {"file": str(target)}
    to_int8, quantization = arguments.precision == "int8", None
    if arguments.to == "safetensors":
        from rarefy.sparse_files import save_sparse

        state = models.read(source.weights)
        save_sparse(state, target)
    elif arguments.to == "engine":
        from rarefy import engine

        model, example = models.network(arguments, source)
        state = model.state_dict()
        calibration = models.calibration(arguments.calibration, source, example) if to_int8 else None
        compiled = engine.compile(model, example, precision=arguments.precision, calibration=calibration)
        engine.save(compiled, target)
        quantization = compiled.report.quantization
        result |= {"seconds": compiled.report.seconds, "chosen": compiled.report.chosen}
    else:
        from rarefy import onnx_files

        onnx_files.require_exporter()
        model, example = models.network(arguments, source)
        state = model.state_dict()
        if to_int8:
            from rarefy.engine import onnx_int8

            batches = models.calibration(arguments.calibration, source, example)
            quantization, result["difference"] = onnx_int8.save_int8_onnx(model, example, batches, target)
        else:
            result["difference"] = onnx_files.save_onnx(model, example, target)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    result |= {
        "bytes": target.stat().st_size,
        "dense_bytes": sum(tensor.nbytes for tensor in state.values()),
        "weights": sum(tensor.numel() for tensor in weights),
        "nonzeros": sum(int(tensor.count_nonzero()) for tensor in weights),
    }
    if quantization is not None:
        result["quantization"] = quantization.to_dict()
    _print(result, arguments.json)
    if quantization is not None and not arguments.json:
        print(quantization)
    return 0


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
