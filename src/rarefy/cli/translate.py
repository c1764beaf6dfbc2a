"""``rarefy translate``: sentences through a run's model."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rarefy.cli import options
from rarefy.cli.outputs import check_file

if TYPE_CHECKING:
    from rarefy.train.translation import Translator

#: Bytes that are read, and so translated, at once at most: about a thousand sentences.
AT_ONCE = 1 << 16


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    translate = commands.add_parser(
        "translate",
        help="translate text by a trained run",
        description="Translate a text line by line, from a file or standard input, by the model of a finished run. "
        "Translations come in the order of the lines, as soon as what was read together is done.",
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
    from rarefy.models.search import NotANumberError
    from rarefy.train.translation import load_translator

    if not 1 <= arguments.beam <= 1000:
        raise ValueError(f"--beam must be in [1, 1000], got {arguments.beam}")
    check_file(arguments.output, "--output")
    if arguments.input is None and sys.stdin is None:
        raise ValueError("standard input is closed: name a FILE of text")
    if arguments.output is None and sys.stdout is None:
        raise ValueError("standard output is closed: name an --output")
    translator = load_translator(arguments.run)
    if arguments.engine:
        translator = translator.compiled()
    if arguments.input is None:
        if sys.stdin.isatty():
            print("a line, Enter, its translation; Ctrl-D ends", file=sys.stderr, flush=True)
        pieces = _lines(cast("io.BufferedIOBase", sys.stdin.buffer), "standard input")
    elif arguments.input.is_file():
        content, where = arguments.input.read_bytes(), str(arguments.input)
        list(_lines(io.BytesIO(content), where))  # all of it can be read, before the first is translated
        pieces = _lines(io.BytesIO(content), where)
    else:
        raise FileNotFoundError(f"there is no text file {arguments.input}")
    streams = arguments.output is None and not arguments.json
    pairs: list[tuple[str, str]] = []
    done = 0
    for lines in pieces:
        _tell_long(translator, lines, done)
        try:
            said = translator(lines, beam=arguments.beam)
        except NotANumberError as error:
            raise NotANumberError(error.sentence, f"line {done + error.sentence + 1}") from None
        done += len(lines)
        if streams:
            sys.stdout.write("".join(f"{line}\n" for line in said))
            sys.stdout.flush()
        else:
            pairs += zip(lines, said, strict=True)
            _tell_done(done)
    if streams:
        return 0
    result = "".join(f"{line}\n" for _, line in pairs)
    if arguments.json:
        plain = [{"source": a, "translation": b} for a, b in pairs]
        result = json.dumps(plain, ensure_ascii=False) + "\n"
    if arguments.output is None:
        sys.stdout.write(result)
    else:
        from rarefy._files import write_atomically

        write_atomically(arguments.output, lambda path: path.write_text(result, encoding="utf-8"))
    return 0


def _lines(file: io.BufferedIOBase, where: str) -> Iterator[list[str]]:
    """Give lines as they come, those that are there together in one list, without their ends and outer spaces.

    Raises ValueError, with the line's number, for what is not UTF-8.
    """
    rest, number = b"", 0
    while True:
        content = file.read1(AT_ONCE)
        *whole, rest = (rest + content).split(b"\n")
        if not content and rest:
            whole = [rest]
        lines = []
        for line in whole:
            number += 1
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except UnicodeDecodeError:
                if lines:
                    yield lines
                raise ValueError(f"{where}, line {number}: not UTF-8 text") from None
        if lines:
            yield lines
        if not content:
            return


def _tell_long(translator: Translator, lines: list[str], before: int) -> None:
    """Say on standard error which lines are longer than all that the run learned from: they come out badly."""
    longest, lengths = translator.longest, translator.lengths(lines)
    long = [index for index, length in enumerate(lengths) if length > longest]
    if long:
        others = f" and {len(long) - 1} more" if len(long) > 1 else ""
        first, tokens = before + long[0] + 1, lengths[long[0]]
        print(
            f"line {first}{others}: {tokens} tokens, and the run learned from up to {longest}"
            " (data.longest): one sentence a line is translated better",
            file=sys.stderr,
            flush=True,
        )


def _tell_done(done: int) -> None:
    """Say how far it is where a person looks and nothing else is to be seen."""
    if sys.stderr.isatty():
        print(f"{done:,} lines", file=sys.stderr, flush=True)
