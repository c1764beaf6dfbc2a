"""Sparse training in a Trainer of transformers.

::

    from rarefy import AutoSparse
    from rarefy.integrations.hf import SparsifierCallback

    def make(model, total_steps):
        return AutoSparse(model, target=0.9, total_steps=total_steps, exclude=["classifier"])

    Trainer(model, arguments, train_dataset=data, callbacks=[SparsifierCallback(make)]).train()

The trainer knows how many steps it takes, so it is given how to make the sparsifier. At the end the model has exact
zeros. A checkpoint of the trainer gains ``sparsifier.pt``, and training goes on from one with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from rarefy._files import write_atomically
from rarefy.sparse import Sparsifier

#: What a checkpoint's folder holds beside the trainer's own files.
FILE = "sparsifier.pt"


class SparsifierCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Attaches a sparsifier to the trainer's optimizer, saves and logs its state, and finalizes the model.

    Args:
        make: called with the model and the number of optimizer steps when training begins; gives the sparsifier.

    Attributes:
        sparsifier: of the training that runs, or ran last.

    Raises:
        FileNotFoundError: training resumes from a checkpoint that no sparsifier's state was saved with.
        ValueError: ``load_best_model_at_end`` with a checkpoint from before the target was reached.
    """

    def __init__(self, make: Callable[[nn.Module, int], Sparsifier]) -> None:
        self.make = make
        self.sparsifier: Sparsifier | None = None
        self._resumed: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Make the sparsifier, and attach it to the optimizer."""
        if getattr(args, "load_best_model_at_end", False):
            raise ValueError(
                "load_best_model_at_end would take the weights of a checkpoint that is less sparse than the target: leave "
                "it out, and compare the models that finalize() leaves"
            )
        self.sparsifier = self.make(trainer["model"], state.max_steps).attach(trainer["optimizer"])
        if state.global_step:
            folder = Path(args.resume_from_checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if isinstance(args.resume_from_checkpoint, bool):
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not (folder / FILE).is_file():
                raise FileNotFoundError(f"{folder} has no {FILE}: it was saved without this callback; train from the start")
            self.sparsifier.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Write the sparsifier's state into the checkpoint's folder."""
        if self.sparsifier is not None and state.is_world_process_zero:
            saved = self.sparsifier.state_dict()
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: torch.save(saved, temporary))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **trainer: Any) -> None:
        """Add the sparsity to what is logged."""
        if self.sparsifier is not None and logs is not None:
            logs["sparsity"] = self.sparsifier.sparsity()
            state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Leave exact zeros in the model."""
        if self.sparsifier is not None:
            self.sparsifier.finalize()
