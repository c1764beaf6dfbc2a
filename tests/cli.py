"""What the tests of the command line share."""

import json
from typing import Any

import pytest

from rarefy.cli import main


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    """Run a command with ``--json``; gives its one object, when nothing was said on standard error."""
    assert main([*words, "--json"]) == status
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    """Run a command that fails; gives what it says: one line, and nothing on standard output."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("rarefy: ")
    assert err.count("\n") == 1
    return err
