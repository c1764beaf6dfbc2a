"""``rarefy bench act`` and ``rarefy bench engine``; light to import, the work is in rarefy.act and rarefy.engine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy._files import write_csv
from rarefy.cli import models, options
from rarefy.cli.outputs import check_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rarefy.engine import Engine, Profile

#: The inputs of the networks that are known by name.
_INPUTS = {"fashion_cnn": "1,28,28", "resnet20": "3,32,32"} | dict.fromkeys(
    ("mobilenet_v1", "resnet18", "resnet50"), "3,224,224"
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of ``rarefy``."""
    rooms = commands.add_parser("bench", help="measure time on this machine").add_subparsers(
        required=True, metavar="WHAT"
    )
    _add_act(rooms)
    _add_engine(rooms)


def _add_act(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = rooms.add_parser(
        "act",
        help="activation functions against PyTorch, SLEEF, HardTanh and memcpy",
        description="Every activation function in turn with PyTorch's, SLEEF's, HardTanh and memcpy, on one pinned"
        " thread; medians over the rounds, and which targets they meet.",
    )
    bench.add_argument("--sizes", default="L1,L2,DRAM", help="comma-separated: L1, L2, DRAM (default: all)")
    bench.add_argument("--rounds", type=int, default=21, metavar="N", help="how often each is measured (default: 21)")
    bench.add_argument("--no-inductor", action="store_true", help="leave out oneDNN and compiled code")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows to this file")
    options.add_json(bench)
    bench.set_defaults(command=_act, measures=True)


def _add_engine(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    options.add_model(bench)
    bench.add_argument("--input", metavar="SHAPE", help="of one input, without the batch: 3,224,224")
    bench.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="first keep this share of the weights of every layer but the first, those of largest magnitude",
    )
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="samples at once (default: 1)")
    bench.add_argument("--precision", default="float32", help="float32 (default), bfloat16 (weights) or int8")
    bench.add_argument("--rounds", type=int, default=21, metavar="N", help="how often it runs (default: 21)")
    bench.add_argument("--save", type=Path, metavar="FILE", help="also write the engine to this file")
    bench.add_argument(
        "--peers", action="store_true", help="beside onnxruntime and OpenVINO, those that are installed (needs onnx)"
    )
    options.add_json(bench)
    bench.set_defaults(command=_engine, measures=True)


def _act(arguments: argparse.Namespace) -> int:
    from rarefy.bench import act as bench

    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    check_file(arguments.csv, "--csv")
    # No folders of a machine in what is stored.
    given = f"--sizes {arguments.sizes} --rounds {arguments.rounds}" + " --no-inductor" * arguments.no_inductor
    about = bench.environment(f"rarefy bench act {given}")
    found = bench.run(arguments.sizes.split(","), arguments.rounds, compiled=not arguments.no_inductor)
    if arguments.csv is not None:
        write_csv(arguments.csv, bench.rows(found, about))
    judged = bench.targets(found)
    if arguments.json:
        targets = [{**asdict(target), "met": target.met} for target in judged]
        print(json.dumps({"environment": about, "measured": [asdict(m) for m in found], "targets": targets}))
    else:
        print(bench.text(found, judged))
    return 0


def _engine(arguments: argparse.Namespace) -> int:
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
        # Speed does not depend on ranges: for int8 any numbers do.
        calibration = [x] if arguments.precision == "int8" else None
        compiled = engine.compile(model, x, threads=1, precision=arguments.precision, calibration=calibration)
        if arguments.peers:
            others = peers.race(model, compiled, x, arguments.rounds)
    if arguments.save is not None:
        engine.save(compiled, arguments.save)
    inputs = [torch.randn(arguments.batch, *port.shape[1:], dtype=port.dtype) for port in compiled.inputs]
    found, call = compiled.profile(*inputs, rounds=arguments.rounds), compiled.seconds(*inputs, rounds=arguments.rounds)
    _print(arguments, compiled, found, call, others)
    return 0


def _network(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode, and one sample."""
    import torch

    from rarefy.models import create

    path = Path(arguments.source)
    if path.exists():
        return models.network(arguments, models.find(path))
    if arguments.model is not None:
        raise ValueError(f"there is no {path}; --model goes with a file of weights")
    model = create(arguments.source, **models.model_options(arguments.set))
    given = arguments.input or _INPUTS.get(arguments.source)
    if given is None:
        raise ValueError(f"--input is missing: of one input of {arguments.source}, such as 3,224,224")
    shape = models.input_shape(given)
    return model.eval(), torch.zeros(1, *shape)


def _prune(model: nn.Module, density: float) -> None:
    """Keep the weights of largest magnitude in every layer but the first."""
    from torch import nn

    from rarefy.sparse.masks import top_k

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    for layer in layers[1:]:
        weight = layer.weight.data
        weight.mul_(top_k(weight.abs(), round(density * weight.numel())))


def _print(
    arguments: argparse.Namespace, compiled: Engine, found: Profile, call: float, others: dict[str, float]
) -> None:
    report = compiled.report
    if arguments.json:
        from rarefy import environment

        about: dict[str, Any] = {"environment": environment.describe(), "report": asdict(report)}
        print(json.dumps({**about, "profile": found.to_dict(), "call_seconds": call, "peers": others}))
        return
    print(found)
    print(f"a call, no clock read in it: {1e3 * call:.3f} ms")
    ways = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in report.candidates.items())
    print(f"runs by: {report.chosen}" + (f" ({ways})" if ways else ""))
    print(f"compiled in {report.seconds:.1f} s, of which measuring {report.measuring_seconds:.1f} s")
    print(f"weights {report.weight_bytes:,} bytes ({report.precision}), scratch {report.scratch_bytes:,} bytes")
    for name, seconds in others.items():
        print(f"{name:>12}  {1e3 * seconds:.2f} ms, {seconds / others['rarefy']:.2f} times rarefy's")
    if arguments.save is not None:
        print(f"written to {arguments.save}")
