"""``rarefy translate``: sentences through a run's model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rarefy.cli import options
from rarefy.cli.outputs import check_file


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    translate = commands.add_parser(
        "translate",
        help="translate text by a trained run",
        description="Translate a text line by line, from a file or standard input, by the model of a finished run.",
        epilog="example: echo 'The file does not exist.' | rarefy translate runs/gnmt",
    )
    translate.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that trained gnmt")
    translate.add_argument("input", type=Path, nargs="?", metavar="FILE", help="text in UTF-8; default standard input")
    translate.add_argument("--output", type=Path, metavar="FILE", help="where to; default standard output")
    translate.add_argument(
        "--beam", type=int, default=4, help="partial translations that go on; 1 is greedy; default 4"
    )
    translate.add_argument(
        "--engine",
        action="store_true",
        help="compile the model first, which takes some ten seconds: many sentences are then translated in less time",
    )
    options.add_json(translate)
    translate.set_defaults(command=_translate)


def _translate(arguments: argparse.Namespace) -> int:
    from rarefy.train.translation import load_translator

    if not 1 <= arguments.beam <= 1000:
        raise ValueError(f"--beam must be in [1, 1000], got {arguments.beam}")
    check_file(arguments.output, "--output")
    translator = load_translator(arguments.run)
    where = "standard input" if arguments.input is None else str(arguments.input)
    if arguments.input is not None and not arguments.input.is_file():
        raise FileNotFoundError(f"there is no text file {where}")
    content = sys.stdin.buffer.read() if arguments.input is None else arguments.input.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{where}, line {line}: not UTF-8 text") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.strip() for line in lines]
    if arguments.engine:
        translator = translator.compiled()
    said = translator(lines, beam=arguments.beam)
    result = "".join(f"{line}\n" for line in said)
    if arguments.json:
        pairs = [{"source": a, "translation": b} for a, b in zip(lines, said, strict=True)]
        result = json.dumps(pairs, ensure_ascii=False) + "\n"
    if arguments.output is None:
        sys.stdout.write(result)
    else:
        from rarefy._files import write_atomically

        write_atomically(arguments.output, lambda path: path.write_text(result, encoding="utf-8"))
    return 0
