"""How the report says a number, and the one sentence that says the result."""

from __future__ import annotations

import math

from rarefy.report.run import Run

NONE = "\u2013"
_SPACE = "\u00a0"  # a number and its unit stay on one line


def percent(share: float | None, digits: int = 1) -> str:
    """0.9 as "90.0 %"; more digits where rounding would claim exactly 0 or 100 %."""
    if share is None:
        return NONE
    if not math.isfinite(share):
        return "not a number"
    while digits < 4 and round(100 * share, digits) in (0.0, 100.0) and share not in (0.0, 1.0):
        digits += 1
    return f"{100 * share:.{digits}f}{_SPACE}%"


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits."""
    return NONE if value is None else f"{value:.{digits}g}"


def whole(value: float | None) -> str:
    """270896 as "270,896"."""
    return NONE if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """40813184 as "40.8 M"."""
    if value is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{_SPACE}{unit}"
    return f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """3.98765 as "3.99 ms"."""
    return NONE if value is None else f"{value:.3g}{_SPACE}ms"


def duration(seconds: float | None) -> str:
    """3725 as "1 h 02 min"."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s"
    return f"{minutes // 60}{_SPACE}h {minutes % 60:02d}{_SPACE}min"


def points(difference: float) -> str:
    """A difference of two shares as "+0.4 points", with a sign."""
    rounded = round(100 * difference, 1)
    sign = "" if not rounded else "+" if rounded > 0 else "\u2212"
    return f"{sign}{abs(rounded):.1f}{_SPACE}points"


def against(difference: float, other: str) -> str:
    """A difference in accuracy as "0.4 points below dense"."""
    rounded = round(100 * difference, 1)
    if not rounded:
        return f"within 0.1{_SPACE}points of {other}"
    return f"{abs(rounded):.1f}{_SPACE}points {'above' if rounded > 0 else 'below'} {other}"


def verdict(run: Run, kind: str) -> str:
    """Whether the run landed on its target of this kind ("sparsity", "flops" or "ms"); empty if it had none."""
    if run.target is None or run.target_kind != kind:
        return ""
    if kind == "ms":
        return f"target {milliseconds(run.target)}"
    reached = run.sparsity if kind == "sparsity" else run.inference_flops_ratio
    aim = f"target {percent(run.target)}"
    if reached is None or run.summary is None:
        return aim
    short_by = run.target - reached if kind == "sparsity" else reached - run.target
    if abs(short_by) < 0.0005:
        return f"{aim}, met"
    side = "short of" if short_by > 0 else "beyond"
    return f"{100 * abs(short_by):.1f}{_SPACE}points {side} the {aim}"


def baseline_name(baseline: Run) -> str:
    """What the page calls the run that it compares with."""
    return ("dense" if baseline.is_dense else baseline.name) + ("" if baseline.summary else " (unfinished)")


def headline(run: Run, baseline: Run | None) -> str:
    """The result in one plain sentence."""
    parts = []
    if not run.is_dense:
        parts.append(f"{percent(run.sparsity)} of the weights are zero")
        if run.inference_flops_ratio is not None:
            parts.append(f"{percent(run.inference_flops_ratio)} of the inference FLOPs remain")
    accuracy = run.test_accuracy
    if accuracy is not None:
        parts.append(f"{percent(accuracy)} test accuracy")
        if baseline is not None and baseline.test_accuracy is not None and run.summary is not None:
            parts.append(against(accuracy - baseline.test_accuracy, baseline_name(baseline)))
    if run.summary is not None and run.summary.test_bleu is not None:
        parts.append(f"BLEU {run.summary.test_bleu:.2f} on the test set")
    elif run.valid_perplexity is not None:
        parts.append(f"perplexity {run.valid_perplexity:.2f} on the validation set")
    if run.is_dense and run.summary is not None:
        if run.summary.dense_flops is not None:
            parts.append(f"{short(run.summary.dense_flops)} inference FLOPs")
        if run.summary.parameters is not None:
            parts.append(f"{short(run.summary.parameters)} parameters, none of them pruned")
    sentence = ", ".join(parts) or "nothing measured yet"
    if run.summary is not None:
        return f"{sentence}." if not run.is_dense else f"A dense run: {sentence}."
    progress = f"epoch {run.epoch:.1f}" + (f" of {run.epochs:g}" if run.epochs else "")
    return f"Unfinished, at {progress}: {sentence}."
