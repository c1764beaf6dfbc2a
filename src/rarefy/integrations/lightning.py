"""Sparse training in a Trainer of Lightning."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from rarefy.integrations._callback import Make, checked, made, whole_state
from rarefy.sparse import Sparsifier

#: The number of steps that a dry run (``fast_dev_run``) is taken for, which every schedule fits into.
DRY_RUN = 100_000


class SparsifierCallback(Callback):
    """Makes a sparsifier when training begins, attaches it, saves and logs its state, and finalizes the module.

    ::

        from rarefy import AutoSparse
        from rarefy.integrations.lightning import SparsifierCallback

        def make(model, total_steps):
            return AutoSparse(model, target=0.9, total_steps=total_steps)

        trainer = L.Trainer(max_epochs=10, callbacks=[SparsifierCallback(make)])
        trainer.fit(module, loader)                # or fit(module, loader, ckpt_path=...), to the same bits
        trainer.save_checkpoint("sparse.ckpt")     # exact zeros, the dense module's keys

    The state is part of Lightning's checkpoints. "sparsity", in [0, 1], is logged in every step, and measured as often
    as the trainer logs. With several optimizers under manual optimization a step is over when each has stepped;
    where that is not once a batch, let ``make`` use a number of steps of its own. A dry run (``fast_dev_run``) is taken
    for the beginning of a long one, and ends with exact zeros too.

    Args:
        make: called with the module and the number of optimizer steps when training begins; gives the sparsifier.

    Attributes:
        sparsifier: of the training that runs, or ran last; None before.

    Raises:
        TypeError: ``make`` is no function, or gives no sparsifier.
        ValueError: a training without an end; one that goes on from a checkpoint without a sparsifier's state.
    """

    def __init__(self, make: Make) -> None:
        self.make = checked(make)
        self.sparsifier: Sparsifier | None = None
        self._loaded: dict[str, Any] | None = None
        self._sparsity = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the checkpoint of an earlier call of the trainer; this one's is loaded next.

        The callback takes its turn after all others, which may write an average of the weights into the module when
        training ends; those that save checkpoints stay the last.
        """
        self._loaded = None
        trainer.callbacks = sorted(  # type: ignore[attr-defined, unused-ignore]
            trainer.callbacks,  # type: ignore[attr-defined, unused-ignore]
            key=lambda callback: (isinstance(callback, Checkpoint), callback is self),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what Lightning takes out of a checkpoint, before there are optimizers."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the sparsifier, and attach it to the optimizers."""
        dry = trainer.fast_dev_run  # type: ignore[attr-defined, unused-ignore]
        steps = DRY_RUN if dry else trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                "the sparsifier needs to know when training ends: give the Trainer max_steps, or max_epochs and a "
                "loader that has a length"
            )
        if trainer.ckpt_path and self._loaded is None:
            raise ValueError(
                f"{trainer.ckpt_path} has no state of a sparsifier, as if it was saved without this callback or after "
                "the end: train from the start, from its weights if you like (load_from_checkpoint)"
            )
        sparsifier = made(self.make, pl_module, int(steps))
        if self._loaded is not None:
            sparsifier.load_state_dict(self._loaded)
        self.sparsifier, self._loaded = sparsifier.attach(*trainer.optimizers), None
        self._sparsity = self.sparsifier.sparsity()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Log the sparsity."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined, unused-ignore]
        if self.sparsifier is not None and every:
            if self.sparsifier.steps % every == 0:
                self._sparsity = self.sparsifier.sparsity()
            pl_module.log("sparsity", self._sparsity)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave exact zeros in the module."""
        if self.sparsifier is not None:
            with warnings.catch_warnings():
                if trainer.fast_dev_run:  # type: ignore[attr-defined, unused-ignore]
                    warnings.filterwarnings("ignore", r"finalize\(\) after")  # how far it is from the target
                self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning puts into a checkpoint; nothing before training begins, and when it has ended."""
        if self.sparsifier is None or self.sparsifier.finalized:
            return {}
        return whole_state(self.sparsifier)
