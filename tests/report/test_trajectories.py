"""The figure of several runs' sparsity."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from rarefy.report import load
from rarefy.report.trajectories import trajectories


def test_every_run_has_its_line(make_run: Callable[..., Path], sparse_run: Path, tmp_path: Path) -> None:
    half = load(make_run(tmp_path / "half", finished=False))
    runs = {"annealed": load(sparse_run), "<half & half>": half, "_of a very long name, much longer than needed": half}
    drawn = trajectories(runs)
    assert drawn == trajectories(runs)
    assert "var(" not in drawn  # it stands alone
    text = "".join(ElementTree.fromstring(drawn).itertext())
    for word in ("annealed (91", "<half & half> (91", "sparsity", "alpha", "training progress"):
        assert word in text


def test_png(sparse_run: Path) -> None:
    assert trajectories({"annealed": load(sparse_run)}, "png").startswith(b"\x89PNG")


def test_a_run_without_sparsity_is_refused(dense_run: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one run that logged its sparsity, got no runs"):
        trajectories({})
    with pytest.raises(ValueError, match="got dense"):
        trajectories({"dense": load(dense_run)})
