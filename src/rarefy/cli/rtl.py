"""``rarefy rtl emit``, ``verify``, ``synth`` and ``search``; light to import, the work is in rarefy.rtl."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli import options, rtl_cost
from rarefy.cli.outputs import check_file

if TYPE_CHECKING:
    from rarefy.rtl.design import Design


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of ``rarefy``."""
    actions = commands.add_parser("rtl", help="hardware of activation tables: SystemVerilog").add_subparsers(
        required=True, metavar="ACTION"
    )
    emit = actions.add_parser(
        "emit",
        help="a table as SystemVerilog",
        description="Write a table as one module of SystemVerilog, with ports x and y of the table's format.",
        epilog="examples: rarefy rtl emit tanh_bf16_ktanh --stages 2 --output tanh.sv;"
        " rarefy rtl emit silu_bf16_shifts --format fp32 --stages 1 --handshake --lanes 4",
    )
    emit.add_argument("--output", type=Path, metavar="FILE.sv", help="write it there; default: standard output")
    emit.set_defaults(command=_emit)
    verify = actions.add_parser(
        "verify",
        help="compare that SystemVerilog with the table on every input",
        description="Make a table's SystemVerilog and compare it with the table: in simulation on all inputs (float32:"
        " a sample), or by a proof. Exits with 1 when something differs.",
        epilog="examples: rarefy rtl verify tanh_bf16_ktanh --stages 2 --handshake;"
        " rarefy rtl verify tanh_bf16_ktanh --format fp32 --tool formal --against-narrow",
    )
    verify.add_argument("--tool", default="icarus", help="icarus (default), verilator or formal")
    verify.add_argument(
        "--against-narrow",
        action="store_true",
        help="with --format: prove that the high bits are the unit's of the table's own format",
    )
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="of the random stalls and orders (default: 0)")
    verify.set_defaults(command=_verify)
    for command in (emit, verify):
        _add_design(command)
        options.add_json(command)
    rtl_cost.add(actions)


def _add_design(command: argparse.ArgumentParser) -> None:
    """Add what describes a design."""
    command.add_argument("table", metavar="NAME|FILE", help="a shipped table (rarefy table show) or a .json file")
    command.add_argument("--style", default="shift_add", help="shift_add (default), flat or programmable")
    command.add_argument("--format", metavar="FORMAT", help="move the table to this format first: fp16 or fp32")
    command.add_argument("--stages", type=int, default=0, metavar="N", help="0 (combinational, default), 1 or 2")
    command.add_argument("--handshake", action="store_true", help="valid and ready on both sides")
    command.add_argument("--lanes", type=int, default=1, metavar="N", help="numbers at a time (default: 1)")
    command.add_argument("--nan", default="keep", help="what NaN gives: keep (default), quiet or none (no logic)")
    command.add_argument("--top", metavar="NAME", help="name of the module; default: the table's")


def _design(arguments: argparse.Namespace) -> Design:
    from rarefy import act, rtl

    if arguments.command is _emit:
        check_file(arguments.output, "--output", ".sv")
    table = act.load(arguments.table)
    if arguments.format is not None and arguments.format != table.format:
        table = table.to_format(arguments.format)
    given = ["rarefy", "rtl", "emit", arguments.table]
    for option in ("style", "format", "stages", "handshake", "lanes", "nan", "top"):
        value = getattr(arguments, option)
        if value not in (None, False, 0) and value != _DEFAULTS.get(option):
            given += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return rtl.emit(
        table,
        arguments.style,
        stages=arguments.stages,
        handshake=arguments.handshake,
        lanes=arguments.lanes,
        nan=arguments.nan,
        top=arguments.top,
        command=shlex.join(given),
    )


_DEFAULTS = {"style": "shift_add", "lanes": 1, "nan": "keep"}


def _emit(arguments: argparse.Namespace) -> int:
    design = _design(arguments)
    if arguments.output is not None:
        design.save(arguments.output)
    if arguments.json:
        result = {
            "top": design.top,
            "format": design.format.name,
            "latency": design.latency,
            "lanes": design.lanes,
            "handshake": design.handshake,
            "ports": [asdict(port) for port in design.ports],
            "about": asdict(design.about),
            "setup": design.setup,
            "file": None if arguments.output is None else str(arguments.output),
        }
        print(json.dumps(result if arguments.output is not None else {**result, "text": design.text}))
    elif arguments.output is None:
        print(design.text, end="")
    else:
        ports = ", ".join(f"{port.name} {port.width}" for port in design.ports)
        error = "not known" if design.about.max_abs is None else f"{design.about.max_abs:.6g}"
        lines = [("module", design.top), ("ports", ports), ("latency", f"{design.latency} clocks")]
        for key, value in [*lines, ("largest error", error), ("written to", str(arguments.output))]:
            print(f"{key:>14}  {value}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from rarefy import act, rtl

    design = _design(arguments)
    against = None
    if arguments.against_narrow:
        table = act.load(arguments.table)
        if table.format == design.format.name:
            raise ValueError("--against-narrow needs --format: a wider format than the table's")
        against = rtl.emit(table, top=f"{design.top}_narrow")
    found = rtl.verify(design, arguments.tool, against=against, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(found.as_dict()))
        return 0 if found.passed else 1
    n = (design.format.bits + 3) // 4
    lines = [
        ("verified" if found.passed else "FAILED", f"{found.design}: {found.statement}"),
        ("inputs", f"{found.inputs:,}, {found.mismatches:,} differ"),
    ]
    if found.first is not None:
        given = "unknown" if found.first.y is None else f"{found.first.y:#0{n + 2}x}"
        lines.append(
            ("first", f"x = {found.first.x:#0{n + 2}x} gives {given}, expected {found.first.expected:#0{n + 2}x}")
        )
    lines += [("fault", fault) for fault in found.faults]
    lines += [("except", each) for each in found.exceptions]
    lines.append(("by", ", ".join(f"{name} {version}" for name, version in found.versions.items())))
    for key, value in [*lines, ("in", f"{found.seconds:.1f} s")]:
        print(f"{key:>14}  {value}")
    return 0 if found.passed else 1
