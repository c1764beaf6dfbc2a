"""``rarefy bench engine``; light to import, the work is in rarefy.engine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy import _export_commands
from rarefy._outputs import check_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rarefy.engine import Engine, Profile

#: The inputs of the networks that are known by name.
_INPUTS = {"fashion_cnn": "1,28,28", "mobilenet_v1": "3,224,224", "resnet20": "3,32,32", "resnet50": "3,224,224"}


def add(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``rarefy bench``."""
    bench = rooms.add_parser(
        "engine",
        help="a network in the engine: time, kernel and gain of every layer",
        description="Compile a network for this CPU and print where its time goes: per layer the kernel that was"
        " chosen, its speed on nonzero weights, and the fastest dense way beside it.",
        epilog="examples: rarefy bench engine resnet50 --density 0.1; rarefy bench engine runs/demo; rarefy bench"
        " engine weights.safetensors --model resnet50 --input 3,224,224; rarefy bench engine network.engine."
        " Against other runtimes: python benchmarks/engine.py",
    )
    bench.add_argument(
        "source",
        metavar="MODEL",
        help="a network's name (resnet50, ...), a run's folder, a safetensors file of weights, or an engine's file",
    )
    bench.add_argument("--model", metavar="NAME", help="of a file of weights, its network: resnet50, ...")
    bench.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of that network: num_classes=10"
    )
    bench.add_argument("--input", metavar="SHAPE", help="of one input, without the batch: 3,224,224")
    bench.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="first keep this share of the weights of every layer but the first, those of largest magnitude",
    )
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="samples at once (default: 1)")
    bench.add_argument("--weights", default="float32", help="float32 (default) or bfloat16: how weights are stored")
    bench.add_argument("--rounds", type=int, default=21, metavar="N", help="how often it runs (default: 21)")
    bench.add_argument("--save", type=Path, metavar="FILE", help="also write the engine to this file")
    bench.add_argument(
        "--peers", action="store_true", help="beside onnxruntime and OpenVINO, those that are installed (needs onnx)"
    )
    bench.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    bench.set_defaults(command=_bench, measures=True)


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from rarefy import engine
    from rarefy.bench import engine as peers

    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.density is not None and not 0 < arguments.density <= 1:
        raise ValueError(f"--density must be in (0, 1], got {arguments.density}; 0.1 keeps a tenth of the weights")
    if arguments.peers and not peers.installed():
        raise ValueError("--peers needs another runtime: pip install onnxruntime, or openvino")
    check_file(arguments.save, "--save")
    torch.set_num_threads(1)
    others: dict[str, float] = {}
    torch.manual_seed(0)
    if Path(arguments.source).suffix == ".engine":
        if any(getattr(arguments, name) for name in ("model", "set", "input", "density", "peers")):
            raise ValueError("an engine's file is what it is: leave all but --batch, --rounds and --json out")
        compiled = engine.load(arguments.source)
    else:
        model, sample = _network(arguments)
        if arguments.density is not None:
            _prune(model, arguments.density)
        x = torch.randn(arguments.batch, *sample.shape[1:])
        compiled = engine.compile(model, x, threads=1, weights=arguments.weights)
        if arguments.peers:
            others = peers.race(model, compiled, x, arguments.rounds)
    if arguments.save is not None:
        engine.save(compiled, arguments.save)
    inputs = [torch.randn(arguments.batch, *port.shape[1:], dtype=port.dtype) for port in compiled.inputs]
    _print(arguments, compiled, compiled.profile(*inputs, rounds=arguments.rounds), others)
    return 0


def _network(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode, and one sample."""
    import torch

    from rarefy import models

    path = Path(arguments.source)
    if path.exists():
        return _export_commands._network(arguments, _export_commands._find(path))
    if arguments.model is not None:
        raise ValueError(f"there is no {path}; --model goes with a file of weights")
    model = models.create(arguments.source, **_export_commands._options(arguments.set))
    shape = _export_commands._shape(arguments.input or _INPUTS[arguments.source])
    return model.eval(), torch.zeros(1, *shape)


def _prune(model: nn.Module, density: float) -> None:
    """Keep the weights of largest magnitude in every layer but the first."""
    from torch import nn

    from rarefy.sparse.masks import top_k

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    for layer in layers[1:]:
        weight = layer.weight.data
        weight.mul_(top_k(weight.abs(), round(density * weight.numel())))


def _print(arguments: argparse.Namespace, compiled: Engine, found: Profile, others: dict[str, float]) -> None:
    report = compiled.report
    if arguments.json:
        from rarefy import environment

        about: dict[str, Any] = {"environment": environment.describe(), "report": asdict(report)}
        print(json.dumps({**about, "profile": found.to_dict(), "peers": others}))
        return
    print(found)
    ways = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in report.candidates.items())
    print(f"runs by: {report.chosen}" + (f" ({ways})" if ways else ""))
    print(f"compiled in {report.seconds:.1f} s, of which measuring {report.measuring_seconds:.1f} s")
    print(f"weights {report.weight_bytes:,} bytes ({report.weights}), scratch {report.scratch_bytes:,} bytes")
    for name, seconds in others.items():
        print(f"{name:>12}  {1e3 * seconds:.2f} ms, {seconds / others['rarefy']:.2f} times rarefy's")
    if arguments.save is not None:
        print(f"written to {arguments.save}")
