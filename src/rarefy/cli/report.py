"""``rarefy report``; light to import, the work is in rarefy.report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rarefy.cli import options
from rarefy.cli.outputs import check_file


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    report = commands.add_parser("report", help="write a run's report as one HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    report.add_argument("--baseline", type=Path, metavar="RUN", help="a dense run's folder, to compare with")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page; default RUN/report.html")
    options.add_json(report)
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from rarefy import report

    if arguments.folder.is_dir():
        check_file(arguments.output or arguments.folder / "report.html", "--output")
    page = report.write(arguments.folder, baseline=arguments.baseline, output=arguments.output)
    if arguments.json:
        print(json.dumps({"report": str(page)}))
    else:
        print_summary(arguments.folder, page, arguments.baseline)
    return 0


def print_summary(folder: Path, page: Path, baseline: Path | None) -> None:
    """Print what a finished run came to, read from its folder; an unfinished one has only its page."""
    summary, dense = _summary(folder), None if baseline is None else _summary(baseline)
    rows = [("report", str(page))]
    if summary is not None:
        rows[:0] = [
            *_quality(summary),
            *([("of the baseline", _quality(dense)[0][1])] if dense is not None else []),
            ("sparsity", f"{100 * summary['sparsity']:.2f} %"),
            ("nonzero weights", f"{summary['nonzeros']:,} of {summary['parameters']:,}"),
            ("inference FLOPs", f"{100 * summary['inference_flops_ratio']:.1f} % of dense (counted, MACs)"),
            ("training FLOPs", f"{100 * summary['training_flops_ratio']:.1f} % of dense (counted)"),
            *([("latency", _latency(summary))] if summary.get("latency_ms") is not None else []),
            ("training time", f"{summary['seconds']:.0f} s"),
            ("model", str(folder / "model.safetensors")),
        ]
    for name, value in rows:
        print(f"{name:>16}  {value}")


def _quality(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """How well the model does its task, the most telling first."""
    if "test_bleu" in summary:
        return [
            ("test BLEU", f"{summary['test_bleu']:.2f} ({summary['bleu_signature']})"),
            ("perplexity", f"{summary['valid_perplexity']:.2f} on the validation set"),
        ]
    top5 = [("top-5 accuracy", f"{100 * summary['test_top5']:.2f} %")] if "test_top5" in summary else []
    return [("test accuracy", f"{100 * summary['test_accuracy']:.2f} %"), *top5]


def _latency(summary: dict[str, Any]) -> str:
    measured, planned, target = summary["measured_ms"], summary["latency_ms"], summary["target"]
    return f"{measured:.3g} ms measured, {planned:.3g} ms by the table, {target:.3g} ms asked for (one thread)"


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None
