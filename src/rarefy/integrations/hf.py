"""Sparse training in a Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rarefy._files import write_through
from rarefy.integrations._callback import Make, checked, made, whole_state
from rarefy.sparse import Sparsifier
from rarefy.sparse.layers import local

#: What a checkpoint's folder holds beside the trainer's own files.
FILE = "sparsifier.pt"


class SparsifierCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Makes a sparsifier when training begins, attaches it, saves and logs its state, and finalizes the model.

    ::

        from rarefy import AutoSparse
        from rarefy.integrations.hf import SparsifierCallback

        def make(model, total_steps):
            return AutoSparse(model, target=0.9, total_steps=total_steps, exclude=["classifier"])

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SparsifierCallback(make)])
        trainer.train()                      # or train(resume_from_checkpoint=True), to the same bits
        trainer.save_model("sparse")         # exact zeros, the dense model's keys

    Every checkpoint gains a ``sparsifier.pt``. ``train(resume_from_checkpoint=True)`` finds it; a checkpoint outside
    ``output_dir`` must be named in ``TrainingArguments(resume_from_checkpoint=...)`` too, which is all that a callback
    sees. The logs gain "sparsity", in [0, 1], for callbacks that come after this one.

    Args:
        make: called with the model and the number of optimizer steps when training begins; gives the sparsifier.

    Attributes:
        sparsifier: of the training that runs, or ran last; None before.

    Raises:
        TypeError: ``make`` is no function, or gives no sparsifier.
        ValueError: ``load_best_model_at_end``, whose best checkpoint is from before the target was reached as a rule;
            ``auto_find_batch_size``, which starts over on weights that are masked already; a ``sparsifier.pt`` that is
            of other weights than those that the trainer has loaded.
        FileNotFoundError: training resumes from a checkpoint without ``sparsifier.pt``.
    """

    def __init__(self, make: Make) -> None:
        self.make = checked(make)
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Make the sparsifier, and attach it to the optimizer."""
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would take the weights of a checkpoint that is less sparse than the target: "
                "leave it out, and compare the models that finalize() leaves"
            )
        if args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size starts over on weights that are masked already: leave it out, and set "
                "per_device_train_batch_size"
            )
        model = trainer["model"]
        sparsifier = made(self.make, model, state.max_steps)
        if state.global_step:
            self._resume(sparsifier, model, _checkpoint(args, state))
        self.sparsifier = sparsifier.attach(trainer["optimizer"])

    @staticmethod
    def _resume(sparsifier: Sparsifier, model: nn.Module, folder: Path) -> None:
        elsewhere = (
            f"if the trainer has loaded another checkpoint than {folder}, name it in "
            "TrainingArguments(resume_from_checkpoint=...)"
        )
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}, as if it was saved without this callback; {elsewhere}")
        loaded = _sizes(model)
        sparsifier.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))
        if not torch.allclose(_sizes(model), loaded, rtol=1e-4):
            raise ValueError(f"{folder / FILE} is of other weights than the model has; {elsewhere}")

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Write the sparsifier's state into the checkpoint's folder."""
        # The trials of a search lie in folders of their own, and nothing resumes them.
        if self.sparsifier is not None and not state.is_hyper_param_search:
            saved = whole_state(self.sparsifier)
            if args.should_save:
                write_through(_newest(args, state) / FILE, lambda file: torch.save(saved, file))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **trainer: Any) -> None:
        """Add the sparsity to what is logged."""
        if self.sparsifier is not None and logs is not None:
            logs["sparsity"] = state.log_history[-1]["sparsity"] = self.sparsifier.sparsity()

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Leave exact zeros in the model."""
        if self.sparsifier is not None:
            self.sparsifier.finalize()


def _newest(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _checkpoint(args: Any, state: Any) -> Path:
    """The checkpoint that training resumes from."""
    named = args.resume_from_checkpoint
    return Path(named) if isinstance(named, str) and Path(named).is_dir() else _newest(args, state)


def _sizes(model: nn.Module) -> Tensor:
    """The norm of each parameter, of what this process has of it."""
    return torch.stack(torch._foreach_norm([local(p).detach().float().cpu() for p in model.parameters()]))
