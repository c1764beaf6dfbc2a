"""``rarefy table show`` and ``rarefy table fit``; light to import, the work is in rarefy.act."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.cli import options
from rarefy.cli.outputs import check_file, check_folder

if TYPE_CHECKING:
    from rarefy.act.spec.error import Errors
    from rarefy.act.spec.oracle import Function
    from rarefy.act.spec.table import Table

_SHIFTS = ("shift", "carry")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of ``rarefy``."""
    kinds = commands.add_parser("table", help="show or fit the tables of activation functions").add_subparsers(
        required=True, metavar="ACTION"
    )
    show = kinds.add_parser("show", help="a table's rows and its errors over all inputs")
    show.add_argument("table", nargs="?", metavar="NAME|FILE", help="a shipped table or a .json file; none lists them")
    show.set_defaults(command=_show)

    fit = kinds.add_parser(
        "fit",
        help="fit a table of your own, or make the shipped ones again and prove them",
        description="Fit a table over every input of a format and print its errors and what was proven.",
        epilog="examples: rarefy table fit --rows 64 --form carry --monotone --output mine.json;"
        " rarefy table fit softsign.py:softsign --form segments --within 0.01; rarefy table fit --shipped tables",
    )
    fit.add_argument(
        "function",
        nargs="?",
        metavar="FUNCTION",
        help="tanh (default), sigmoid, silu, gelu, gelu_tanh, or one of yours on float64 arrays: FILE.py:NAME or"
        " MODULE:NAME",
    )
    fit.add_argument("--shipped", type=Path, metavar="FOLDER", help="make all shipped tables there, and prove them")
    fit.add_argument("--format", metavar="FORMAT", help="bf16 (default), fp16, e4m3fn or e5m2")
    fit.add_argument("--form", help="shift (K-TanH; the default for odd functions), carry, linear or segments")
    fit.add_argument("--rows", type=int, metavar="N", help="rows of a shift, carry (default: 32) or linear table (64)")
    fit.add_argument("--t1", type=float, metavar="X", help="magnitudes below are x itself (shift, carry; default 0.25)")
    fit.add_argument("--t2", type=float, metavar="X", help="magnitudes above are 1 (default: just below 4)")
    fit.add_argument("--objective", help="what is least: max_abs (default), max_ulp or rmse (shift, carry)")
    fit.add_argument("--monotone", action="store_true", help="only tables that never fall (shift, carry)")
    fit.add_argument(
        "--few-shifts", action="store_true", help="fewest distinct shifts first: smaller hardware (shift, carry)"
    )
    fit.add_argument(
        "--within", type=float, metavar="ERROR", help="largest error allowed (linear, segments; default: half an ulp)"
    )
    fit.add_argument(
        "--fraction-bits", type=int, metavar="N", help="fraction bits of the sum (linear: 6, segments: 10)"
    )
    fit.add_argument(
        "--shifts", action="store_true", help="slopes are powers of two: hardware without a product (segments)"
    )
    fit.add_argument("--grid", type=int, metavar="N", help="rows begin at multiples of 2^N patterns (segments)")
    fit.add_argument(
        "--relative", type=float, metavar="ERROR", help="relative error allowed beside --within (segments)"
    )
    fit.add_argument("--output", type=Path, metavar="FILE.json", help="write the table there; its name is the file's")
    fit.set_defaults(command=_fit)

    for command in (show, fit):
        options.add_json(command)


def _show(arguments: argparse.Namespace) -> int:
    from rarefy import act
    from rarefy.act.spec import error, formats, oracle

    if arguments.table is None:
        listed = [(name, act.load(name)) for name in act.list_tables()]
        if arguments.json:
            print(json.dumps(act.list_tables()))
        else:
            print(
                "\n".join(f"{name:22} {t.function} in {t.format}: {len(t.rows)} rows, {t.form}" for name, t in listed)
            )
        return 0
    table = act.load(arguments.table)
    known = table.function in oracle.FUNCTIONS and formats.get(table.format).bits <= 16
    _print(arguments, table, error.of(table) if known else None)
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    if arguments.shipped is not None:
        return _fit_shipped(arguments)
    from rarefy.act.spec import error, oracle

    function = _function("tanh" if arguments.function is None else arguments.function)
    form = arguments.form or ("shift" if oracle.is_odd(function) else "segments")
    table = _fitted(arguments, function, form)
    if arguments.output is not None:
        table.save(arguments.output)
    errors = error.of(table, function)
    _print(arguments, table, errors, _proven(arguments, table, function, errors))
    return 0


def _fitted(arguments: argparse.Namespace, function: Function, form: str) -> Table:
    """The table of the arguments; raises ValueError for those that the form has no use for."""
    from rarefy.act import fit

    fitted_by: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(_SHIFTS, ("rows", "t1", "t2", "objective", "monotone", "few_shifts")),
        "linear": ("rows", "within", "fraction_bits"),
        "segments": ("within", "fraction_bits", "shifts", "grid", "relative"),
    }
    if form not in fitted_by:
        raise ValueError(f"--form must be one of {', '.join(fitted_by)}, got {form!r}")
    for option in dict.fromkeys(option for each in fitted_by.values() for option in each):
        if getattr(arguments, option) not in (None, False) and option not in fitted_by[form]:
            raise ValueError(f"--{option.replace('_', '-')} is not for tables of the form {form}")
    for option, least in (("rows", 1), ("within", 0.0), ("relative", 0.0), ("fraction_bits", 0), ("grid", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} must be at least {least:g}, got {value}")
    for option, most in (("rows", 1 << 15), ("fraction_bits", 31), ("grid", 15)):
        value = getattr(arguments, option)
        if value is not None and value > most:
            raise ValueError(f"--{option.replace('_', '-')} must be at most {most}, got {value}")
    check_file(arguments.output, "--output", ".json")
    name = None if arguments.output is None else arguments.output.stem
    fmt = arguments.format or "bf16"
    if form in _SHIFTS:
        t1 = 0.25 if arguments.t1 is None else arguments.t1
        return fit.fit_shift(
            function,
            fmt,
            _index(32 if arguments.rows is None else arguments.rows, t1, arguments.t2),
            identity_below=t1,
            saturate_above=arguments.t2,
            form=form,
            objective=arguments.objective or "max_abs",
            monotone=arguments.monotone,
            few_shifts=arguments.few_shifts,
            name=name,
        )
    options: dict[str, Any] = {"max_abs": arguments.within, "name": name}
    if arguments.fraction_bits is not None:
        options["fraction_bits"] = arguments.fraction_bits
    if form == "linear":
        return fit.fit_linear(function, fmt, 64 if arguments.rows is None else arguments.rows, **options)
    if arguments.grid is not None:
        options["grid"] = arguments.grid
    return fit.fit_segments(function, fmt, max_rel=arguments.relative or 0.0, shifts=arguments.shifts, **options)


def _index(rows: int, t1: float, t2: float | None) -> Any:
    """The index of that many rows: the exponent bits that T1 to T2 need, the rest mantissa."""
    from rarefy.act import BitIndex

    bits = rows.bit_length() - 1
    if rows < 2 or rows != 1 << bits:
        raise ValueError(f"--rows must be a power of two for shift and carry tables, got {rows}")
    above = math.nextafter(4.0, 0.0) if t2 is None else t2
    if not 0 < t1 <= above < math.inf:
        raise ValueError(f"needs 0 < --t1 <= --t2, got {t1} and {4.0 if t2 is None else t2}")
    octaves = math.frexp(above)[1] - math.frexp(t1)[1] + 1
    exponent_bits = max(1, (octaves - 1).bit_length())
    if exponent_bits > bits:
        raise ValueError(f"T1 to T2 spans {octaves} powers of two, which need at least {1 << exponent_bits} rows")
    return BitIndex(exponent_bits, bits - exponent_bits)


def _function(name: str) -> Function:
    """A known function, or the one that MODULE:NAME or FILE.py:NAME means."""
    from rarefy.act.spec import oracle

    if name in oracle.FUNCTIONS:
        return name
    place, _, attribute = name.rpartition(":")
    if not place:
        raise ValueError(
            f"FUNCTION must be one of {', '.join(oracle.FUNCTIONS)}, or FILE.py:NAME or MODULE:NAME; got {name!r}"
        )
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _load(place, partial(spec.loader.exec_module, module))
    else:
        module = _load(place, lambda: importlib.import_module(place))
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {attribute!r}")
    result: Function = function
    return result


def _load(place: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives; raises ValueError when somebody's code does not load, in whatever way."""
    try:
        return load()
    except Exception as error:
        raise ValueError(f"{place} does not load: {type(error).__name__}: {error}") from error


def _proven(arguments: argparse.Namespace, table: Table, function: Function, errors: Errors) -> dict[str, Any] | None:
    """What the search proves of a fitted table, as a figure and in words."""
    from rarefy.act import BitIndex, fit
    from rarefy.act.spec import formats

    if not isinstance(table.index, BitIndex):
        if arguments.within is not None or errors.misrounded:
            return None
        return {"misrounded": 0, "statement": "correctly rounded on every input"}
    objective = arguments.objective or "max_abs"
    if objective == "rmse":
        if arguments.monotone or arguments.few_shifts:
            return None
        return {"objective": objective, "statement": "by trying every (E, r, b): each row has its least mean square"}
    f = formats.get(table.format)
    t1, t2 = (float(f.decode(bits)) for bits in (table.identity_below, table.saturate_above))
    found = fit.certify(
        function, f, table.index, identity_below=t1, saturate_above=t2, form=table.form, objective=objective
    )
    least = f"{found.least:.6f}" if objective == "max_abs" else f"{found.least:.0f}"
    what = "largest error" if objective == "max_abs" else "largest error in ulp"
    statement = f"by trying every (E, r, b): no such table has a {what} below {least} between T1 and T2"
    return {"objective": objective, "least": found.least, "rows": list(found.rows), "statement": statement}


def _print(
    arguments: argparse.Namespace, table: Table, errors: Errors | None, proven: dict[str, Any] | None = None
) -> None:
    from rarefy.act.spec import formats
    from rarefy.act.spec.table import COLUMNS

    if arguments.json:
        result = {"table": json.loads(table.to_json()), "errors": None if errors is None else asdict(errors)}
        if arguments.command is _fit:
            result |= {"proven": proven, "file": None if arguments.output is None else str(arguments.output)}
        print(json.dumps(result))
        return
    f = formats.get(table.format)
    lines = [("table", table.name), ("function", f"{table.function} in {table.format}, symmetry {table.symmetry}")]
    lines += [("form", f"{table.form}, {len(table.rows)} rows, {table.index}")]
    if table.identity_below:
        lines += [("T1", f"{float(f.decode(table.identity_below)):g}: magnitudes below are x itself")]
    if table.form in _SHIFTS:
        lines += [("T2", f"{float(f.decode(table.saturate_above)):g}: magnitudes above are 1")]
        shifts = sorted({row[1] for row in table.rows})
        lines += [("shifts", f"{len(shifts)} distinct: {', '.join(map(str, shifts))}")]
    else:
        lines += [("fraction bits", str(table.fraction_bits))]
    if errors is not None:
        lines += [
            ("largest error", f"{errors.max_abs:.6g} at x = {errors.worst:g}"),
            ("", f"{errors.max_ulp} ulp; {errors.misrounded} inputs not correctly rounded"),
            ("rms error", f"{errors.rmse:.3g} on [-4, 4]"),
            ("falls", f"{errors.falls} times from an input to the next larger one"),
        ]
    if proven is not None:
        lines += [("proven", proven["statement"])]
    if arguments.command is _fit and arguments.output is not None:
        lines += [("written to", str(arguments.output))]
    for key, value in lines:
        print(f"{key:>14}  {value}")
    print("\n" + f"{'row':>14}" + "".join(f"{column:>10}" for column in COLUMNS[table.form]))
    for number, row in enumerate(table.rows):
        print(f"{number:14d}" + "".join(f"{value:10d}" for value in row))


def _fit_shipped(arguments: argparse.Namespace) -> int:
    from rarefy.act.fit import shipped

    others = ("function", "format", "form", "rows", "t1", "t2", "objective", "within", "fraction_bits", "output")
    for option in (*others, "monotone", "few_shifts", "shifts", "grid", "relative"):
        if getattr(arguments, option) not in (None, False):
            raise ValueError(f"--shipped makes the tables as they are: leave {option.replace('_', '-')} out")
    check_folder(arguments.shipped, "--shipped")
    proofs = [shipped.prove(table) for table in shipped.write(arguments.shipped)]
    proofs.append(shipped.prove_quartic())
    if arguments.json:
        print(json.dumps({"folder": str(arguments.shipped), "tables": [asdict(proof) for proof in proofs]}))
    else:
        for proof in proofs:
            print(f"{'proven' if proof.holds else 'FAILED'}  {proof.name:22} {proof.statement}")
        print(f"{len(proofs)} tables in {arguments.shipped}")
    return 0 if all(proof.holds for proof in proofs) else 1
