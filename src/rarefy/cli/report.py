"""``rarefy report``; light to import, the work is in rarefy.report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli import options
from rarefy.cli.outputs import check_file

if TYPE_CHECKING:
    from rarefy.report.run import Summary

_LATENCY = "{:.3g} ms measured, {:.3g} ms by the table, {:.3g} ms asked for (one thread)"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    report = commands.add_parser("report", help="write a run's report as one HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    report.add_argument("--baseline", type=Path, metavar="RUN", help="a dense run's folder, to compare with")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page, a .html file; default RUN/report.html")
    options.add_json(report)
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from rarefy import report

    if arguments.folder.is_dir():  # the other files of a run are no place for a page
        check_file(arguments.output or arguments.folder / "report.html", "--output", ".html")
    page = report.write(arguments.folder, baseline=arguments.baseline, output=arguments.output)
    if arguments.json:
        print(json.dumps({"report": str(page)}))
    else:
        print_summary(arguments.folder, page, arguments.baseline)
    return 0


def print_summary(folder: Path, page: Path, baseline: Path | None) -> None:
    """Print what a finished run came to, as far as its summary knows; an unfinished one has only its page."""
    from rarefy import report

    run = report.load(folder)
    dense = None if baseline is None else report.load(baseline).summary
    rows: list[tuple[str, str | None]] = [("report", str(page))]
    if (summary := run.summary) is not None:
        rows[:0] = [
            *_quality(summary),
            *([("of the baseline", _quality(dense)[0][1])] if dense is not None else []),
            ("sparsity", _percent(summary.sparsity, 2)),
            ("nonzero weights", _told("{:,} of {:,}", summary.nonzeros, summary.parameters)),
            ("inference FLOPs", _told("{} of dense (counted, MACs)", _percent(summary.inference_flops_ratio, 1))),
            ("training FLOPs", _told("{} of dense (counted)", _percent(summary.training_flops_ratio, 1))),
            ("latency", _told(_LATENCY, summary.measured_ms, summary.latency_ms, run.target)),
            ("training time", _told("{:.0f} s", summary.seconds)),
            ("model", str(folder / "model.safetensors")),
        ]
    for name, value in rows:
        if value is not None:
            print(f"{name:>16}  {value}")


def _told(form: str, *values: float | str | None) -> str | None:
    """The values in this form; None where one is not known."""
    return None if None in values else form.format(*values)


def _percent(share: float | None, digits: int) -> str | None:
    return None if share is None else f"{100 * share:.{digits}f} %"


def _quality(summary: Summary) -> list[tuple[str, str | None]]:
    """How well the model does its task, the most telling first."""
    if summary.test_bleu is not None:
        signature = "" if summary.bleu_signature is None else f" ({summary.bleu_signature})"
        return [
            ("test BLEU", f"{summary.test_bleu:.2f}{signature}"),
            ("perplexity", _told("{:.2f} on the validation set", summary.valid_perplexity)),
        ]
    return [
        ("test accuracy", _percent(summary.test_accuracy, 2)),
        ("top-5 accuracy", _percent(summary.test_top5, 2)),
    ]
