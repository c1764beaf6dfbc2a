"""What a run goes on from."""

from __future__ import annotations

from typing import Any

from rarefy.train.recipe import Recipe, differences, load
from rarefy.train.run_folder import RunFolder


def to_resume(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """The last checkpoint of a run, None where it ended before its first one; nothing is changed yet.

    Raises ValueError for a run of another recipe (only ``data.folder``, ``data.workers`` and ``shard`` may differ) and
    for damaged files, FileNotFoundError where there is no run.
    """
    state, begun = folder.load("last"), folder.path / "recipe.yaml"
    if state is None and not begun.is_file():
        raise FileNotFoundError(f"there is no run in {folder.path} to resume; without --resume it starts there")
    old, new = state["recipe"] if state else load(begun).to_dict(), recipe.to_dict()
    for free in {"folder", "workers"} & new["data"].keys():  # the content of the data is checked, wherever it lies
        old["data"][free] = new["data"][free]
    old["shard"] = new["shard"]  # a checkpoint holds whole tensors
    if changed := differences(old, new):
        raise ValueError(
            f"{folder.path} was started with another recipe, which differs in {', '.join(changed)}; resume with the "
            "same one, or start a new run"
        )
    if state is not None:
        folder.records()
    return state
