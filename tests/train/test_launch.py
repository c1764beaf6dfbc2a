"""The commands that the examples start are ones that torchrun reads as meant."""

import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from rarefy.cli.main import build_parser

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["examples/torchrun.sh", "examples/slurm.sh", "docs/guides/many-machines.md"])
def test_torchrun_hands_the_options_on(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ").replace('"${1:-2}"', "2").replace("$resume", "--resume")
    lines = [line for line in text.splitlines() if "torchrun" in line and " -m " in line and line[0] != "#"]
    assert lines
    for line in lines:
        words = shlex.split(line)
        started = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert (started.module, started.training_script) == (True, "rarefy")
        meant = build_parser().parse_args(started.training_script_args)
        assert meant.recipe.suffix == ".yaml"
        assert meant.run is not None
