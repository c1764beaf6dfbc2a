"""results/zoo.csv in words and as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import results

Row = Mapping[str, str]

#: A difference from PyTorch above this share of the largest output is named.
ERROR = 1e-4
#: Slower than PyTorch: by more than this the network is named.
SLOWER = 0.03
#: Networks that take more seconds to compile are named.
LONG = 15
HEAD = (
    *("network", "input", "weights left", "MACs left", "run by", "native", "compile s", "difference, batch 1, 4"),
    *("PyTorch ms", "ORT ms", "engine ms", "PyTorch", "ORT", "PyTorch, batch 4"),
)


def compiled(row: Row) -> bool:
    """Whether the network compiled and answered at both batch sizes."""
    return bool(row["error_4"])


def worst(row: Row) -> float:
    """The largest difference from PyTorch, at either batch size; NaN where one is."""
    first, second = float(row["error_1"]), float(row["error_4"])
    return second if math.isnan(second) else max(first, second)


def ill_conditioned(row: Row) -> bool:
    """Whether the engine is about as near to float64 as PyTorch is: the network amplifies rounding, whoever rounds."""
    pairs = [(row[f"engine64_{batch}"], row[f"eager64_{batch}"]) for batch in (1, 4)]
    return all(exact and float(engine) <= 4 * float(exact) for engine, exact in pairs)


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _differences(rows: Sequence[Row]) -> str:
    most = max(rows, key=lambda row: math.inf if math.isnan(worst(row)) else worst(row))
    over = [row for row in rows if not worst(row) <= ERROR]
    named = []
    for row in over:
        exact = max(float(row["eager64_1"]), float(row["eager64_4"]))
        why = f" (PyTorch itself is {exact:.1e} from float64)" if ill_conditioned(row) else ""
        named.append(f"{row['network']} {worst(row):.1e}{why}")
    largest = (
        f"- largest difference from PyTorch, as a share of the largest output: {worst(most):.1e} ({most['network']})"
    )
    return f"{largest}; above {ERROR:.0e}: {', '.join(named) or 'none'}"


def _speed(rows: Sequence[Row], batch: int) -> str:
    ratios = {row["network"]: float(row[f"speedup_{batch}"]) for row in rows}
    slower = [f"{name} {ratio:.2f}" for name, ratio in sorted(ratios.items()) if ratio < 1 / (1 + SLOWER)]
    mean = geometric_mean(list(ratios.values()))
    percent = f"{100 * SLOWER:.0f} %"
    return (
        f"- batch {batch}: {mean:.2f} times as fast as PyTorch in the geometric mean of {len(ratios)}; "
        f"slower by more than {percent}: {', '.join(slower) or 'none'}"
    )


def _beside_onnxruntime(rows: Sequence[Row]) -> str:
    ratios = {row["network"]: float(row["ort_speedup_1"]) for row in rows if row["ort_speedup_1"]}
    if not ratios:
        return "- onnxruntime was not measured"
    slower = [f"{name} {ratio:.2f}" for name, ratio in sorted(ratios.items()) if ratio < 1 / (1 + SLOWER)]
    not_run = [row["network"] for row in rows if row["network"] not in ratios]
    return (
        f"- batch 1: {geometric_mean(list(ratios.values())):.2f} times as fast as onnxruntime in the geometric mean of "
        f"{len(ratios)}; slower by more than {100 * SLOWER:.0f} %: {', '.join(slower) or 'none'}; "
        f"not exported, or with another answer: {', '.join(not_run) or 'none'}"
    )


def _files(rows: Sequence[Row]) -> str:
    """What loading costs, and what cannot be saved."""
    loads = sorted(10 * float(row["load_ms"]) / float(row["file_mb"]) for row in rows if row.get("load_ms"))
    if not loads:
        return "- engine files were not measured"
    other = [f"{row['network']} ({row['file']})" for row in rows if row["file"] not in ("", "same bits")]
    whole = [float(row["load_ms"]) for row in rows if row["load_ms"]]
    return (
        f"- engine files: load in {loads[len(loads) // 2]:.1f} ms each 10 MB at the median, {loads[-1]:.1f} at most "
        f"({max(whole):.0f} ms for a whole file); without a file that answers alike: {', '.join(other) or 'none'}"
    )


def _compiling(rows: Sequence[Row]) -> str:
    seconds = sorted((float(row["compile_cpu_seconds"]), row["network"]) for row in rows)
    long = [f"{name} {each:.0f}" for each, name in reversed(seconds) if each > LONG]
    middle = seconds[len(seconds) // 2][0]
    return f"- compiling: {middle:.1f} s of CPU at the median; above {LONG}: {', '.join(long) or 'none'}"


def _kinds(rows: Sequence[Row]) -> str:
    """The geometric means by where the networks come from, of those that onnxruntime ran, too."""
    words = []
    for source in ("timm", "transformers", "plain"):
        own = [row for row in rows if row["source"].startswith(source) and row["ort_speedup_1"]]
        if own:
            means = [geometric_mean([float(row[name]) for row in own]) for name in ("speedup_1", "ort_speedup_1")]
            words.append(f"{source} ({len(own)}) {means[0]:.2f} and {means[1]:.2f}")
    return f"- of these, beside PyTorch and onnxruntime: {'; '.join(words)}"


def summary(rows: Sequence[Row]) -> str:
    """What came of it, line by line."""
    good = [row for row in rows if compiled(row)]
    bad = [f"{row['network']} ({row['note']})" for row in rows if not compiled(row)]
    lines = [f"- {len(rows)} networks, {len(good)} compiled; not compiled: {', '.join(bad) or 'none'}"]
    if good:
        lines.append(_differences(good))
    timed = [row for row in good if row["speedup_4"]]
    if timed:
        lines += [_speed(timed, batch) for batch in (1, 4)]
        lines += [_beside_onnxruntime(timed), _kinds(timed), _compiling(timed), _files(timed)]
    return "\n".join(lines)


def _percent(text: str) -> str:
    return f"{100 * float(text):.0f} %" if text else ""


def _ms(text: str) -> str:
    return f"{float(text):#.3g}".rstrip(".") if text else ""


def _ratio(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def table(rows: Sequence[Row]) -> str:
    """A line for each network."""
    lines: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD)]
    for row in rows:
        errors = f"{row['error_1']}, {row['error_4']}" if compiled(row) else "not compiled"
        lines.append(
            (
                *(row["network"], row["input"], _percent(row["density"]), _percent(row["macs"])),
                *(row["chosen"], _percent(row["native"]), row["compile_cpu_seconds"], errors),
                *(_ms(row[name]) for name in ("eager_ms_1", "ort_ms_1", "engine_ms_1")),
                *(_ratio(row[name]) for name in ("speedup_1", "ort_speedup_1", "speedup_4")),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(rows: Sequence[Row]) -> str:
    """All of it, machine by machine."""
    parts = []
    for processor in sorted(set(map(results.processor, rows))):
        own = [row for row in rows if results.processor(row) == processor]
        parts.append(f"## {processor}\n{summary(own)}\n\n{table(own)}")
    return "\n\n".join(parts)
