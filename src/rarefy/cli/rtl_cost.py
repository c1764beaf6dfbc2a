"""``rarefy rtl synth`` and ``rarefy rtl search``; light to import, the work is in rarefy.rtl."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.cli import options
from rarefy.cli.outputs import check_file

if TYPE_CHECKING:
    from rarefy.rtl.design import Design
    from rarefy.rtl.eda.synth import Synthesis


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two commands to those of ``rarefy rtl``."""
    cost = actions.add_parser(
        "synth",
        help="what a unit costs: gates, delay, energy, and look-up tables of an FPGA",
        description="Map a unit to standard cells by two fixed scripts (area and speed), and to an FPGA if asked.",
        epilog='examples: rarefy rtl synth tanh_bf16_ktanh --stages 2 --fpga; rarefy rtl synth "peer:constants, 64"',
    )
    cost.add_argument(
        "unit",
        metavar="UNIT",
        help='a shipped table or unit of logic, a .json file of either, or a peer, for example "peer:HardTanh"',
    )
    cost.add_argument("--style", default="shift_add", help="of a table: shift_add (default), flat or programmable")
    cost.add_argument("--stages", type=int, default=0, metavar="N", help="of a table: 0 (default), 1 or 2 registers")
    cost.add_argument("--lanes", type=int, default=1, metavar="N", help="of a table: numbers at a time (default 1)")
    cost.add_argument("--nan", default="quiet", help="of a table: keep, quiet (default) or none")
    cost.add_argument("--liberty", type=Path, metavar="FILE", help="cells of your own (default: OSU 0.18 um)")
    cost.add_argument("--script", help="area or speed (default: both)")
    cost.add_argument("--fpga", action="store_true", help="also place on an iCE40 HX8K, five times")
    cost.set_defaults(command=_synth)

    find = actions.add_parser(
        "search",
        help="the smallest or fastest unit within an error",
        description="Search units of logic, and tables with carry, for the least area or delay within an error.",
        epilog="example: rarefy rtl search --error 0.009 --output tanh.sv",
    )
    find.add_argument("function", nargs="?", default="tanh", metavar="FUNCTION", help="tanh (default)")
    find.add_argument("--error", type=float, required=True, metavar="E", help="largest absolute error")
    find.add_argument("--format", default="bf16", help="bf16 (default), fp16, e4m3fn or e5m2")
    find.add_argument("--goal", default="area", help="area (default) or delay")
    find.add_argument("--kinds", default="logic,table", help="logic, table or both (default)")
    find.add_argument("--exact-limit", action="store_true", help="units of logic that give 1 itself far out")
    find.add_argument("--steps", type=int, default=300, metavar="N", help="changes tried (default 300: a minute)")
    find.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    find.add_argument("--liberty", type=Path, metavar="FILE", help="cells of your own (default: OSU 0.18 um)")
    find.add_argument("--output", type=Path, metavar="FILE.sv", help="write the SystemVerilog there")
    find.add_argument("--unit", type=Path, metavar="FILE.json", help="write the unit of logic there")
    find.set_defaults(command=_search, measures=True)
    for command in (cost, find):
        options.add_json(command)


def _design(arguments: argparse.Namespace) -> Design:
    """The design that UNIT and the options mean; raises ValueError when there is none, or options it cannot have."""
    from rarefy import act, rtl
    from rarefy.bench import rtl as peers
    from rarefy.rtl import logic

    name = arguments.unit
    plain = (arguments.style, arguments.stages, arguments.lanes) == ("shift_add", 0, 1)
    if name.startswith("peer:") or name in logic.names() or _is_unit(name):
        if not plain:
            raise ValueError(f"--style, --stages and --lanes are for tables; {name} is none")
        if not name.startswith("peer:"):
            return logic.load(name).design()
        if name.removeprefix("peer:") not in peers.PEERS:
            raise ValueError(f"a peer must be one of {'; '.join(peers.PEERS)}; got {name.removeprefix('peer:')!r}")
        return peers.PEERS[name.removeprefix("peer:")]()
    options = {"stages": arguments.stages, "lanes": arguments.lanes, "nan": arguments.nan}
    return rtl.emit(act.load(name), arguments.style, **options)


def _is_unit(name: str) -> bool:
    return name.endswith(".json") and '"rarefy_logic"' in Path(name).read_text(encoding="utf-8", errors="replace")


def _synth(arguments: argparse.Namespace) -> int:
    from rarefy.rtl.eda import flow, fpga
    from rarefy.rtl.eda.synth import SCRIPTS, synth

    design = _design(arguments)
    if arguments.fpga:
        flow.version("nextpnr-ice40")
    scripts = [arguments.script] if arguments.script else list(SCRIPTS)
    found = [synth(design, arguments.liberty, script) for script in scripts]
    placed = fpga.place(design) if arguments.fpga else None
    if arguments.json:
        result: dict[str, Any] = {"synthesis": [asdict(one) for one in found]}
        print(json.dumps(result | {"fpga": None if placed is None else asdict(placed)}))
        return 0
    _print(design, found)
    if placed is not None:
        mhz = ", ".join(f"{value:.0f}" for value in placed.all_mhz)
        print(f"{'iCE40 HX8K':>14}  {placed.luts} LUT4, {placed.rams} block RAMs, {placed.flip_flops} flip-flops")
        print(f"{'':>14}  {placed.fmax_mhz:.0f} MHz after routing, median of {mhz}")
    return 0


def _print(design: Design, found: list[Synthesis]) -> None:
    error = "not known" if design.about.max_abs is None else f"{design.about.max_abs:.6g}"
    print(f"{'unit':>14}  {design.top}: {design.about.function} in {design.format.name}, latency {design.latency}")
    print(f"{'largest error':>14}  {error}")
    programs = ", ".join(f"{name} {version}" for name, version in found[0].versions.items() if name != "library")
    print(f"{'cells':>14}  {found[0].library}; {programs}")
    for one in found:
        delay = f"{one.abc_delay_ns:.2f} ns by ABC" if one.delay_ns is None else f"{one.delay_ns:.2f} ns"
        energy = "" if one.energy_pj is None else f", {one.energy_pj:.1f} pJ (relative)"
        print(
            f"{one.script:>14}  {one.gate_equivalents:.1f} GE, {one.area:.0f} um2, {one.cells} cells, depth {one.depth}"
        )
        print(f"{'':>14}  {delay}{energy}")


def _search(arguments: argparse.Namespace) -> int:
    from rarefy.rtl import search

    check_file(arguments.output, "--output", ".sv")
    check_file(arguments.unit, "--unit", ".json")
    if arguments.unit is not None and arguments.kinds != "logic":
        raise ValueError("--unit keeps a unit of logic: add --kinds logic")
    found = search.smallest(
        arguments.function,
        arguments.format,
        arguments.error,
        goal=arguments.goal,
        kinds=arguments.kinds.split(","),
        exact_limit=arguments.exact_limit,
        steps=arguments.steps,
        seed=arguments.seed,
        liberty=arguments.liberty,
    )
    if arguments.output is not None:
        found.design.save(arguments.output)
    if arguments.unit is not None:
        assert found.unit is not None
        found.unit.save(arguments.unit)
    if arguments.json:
        tried = [{"design": design.about.name, **asdict(cost)} for design, cost in found.tried]
        print(json.dumps({"max_abs": found.max_abs, "tried": tried, "text": found.design.text}))
        return 0
    _print(found.design, [found.synthesis])
    print(f"{'tried':>14}  {len(found.tried)} designs synthesised")
    for path in (arguments.output, arguments.unit):
        if path is not None:
            print(f"{'written to':>14}  {path}")
    return 0
