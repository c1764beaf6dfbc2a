"""Sparse training in a Trainer of Lightning.

::

    from rarefy import AutoSparse
    from rarefy.integrations.lightning import SparsifierCallback

    def make(model, total_steps):
        return AutoSparse(model, target=0.9, total_steps=total_steps)

    L.Trainer(max_epochs=10, callbacks=[SparsifierCallback(make)]).fit(module, loader)

The trainer knows how many steps it takes, so it is given how to make the sparsifier. At the end the module has exact
zeros. The sparsifier's state is in Lightning's checkpoints, and ``fit(ckpt_path=...)`` goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from rarefy.sparse import Sparsifier


class SparsifierCallback(Callback):
    """Attaches a sparsifier to the module's optimizers, saves and logs its state, and finalizes the module.

    Args:
        make: called with the module and the number of optimizer steps when training begins; gives the sparsifier.

    Attributes:
        sparsifier: of the training that runs, or ran last.

    Raises:
        ValueError: a training without an end (``max_epochs=-1``).
    """

    def __init__(self, make: Callable[[nn.Module, int], Sparsifier]) -> None:
        self.make = make
        self.sparsifier: Sparsifier | None = None
        self._loaded: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the sparsifier, and attach it to the optimizers."""
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the sparsifier needs to know when training ends: give the Trainer max_epochs or max_steps")
        self.sparsifier = self.make(pl_module, int(steps)).attach(*trainer.optimizers)
        if self._loaded is not None:
            self.sparsifier.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *about: Any) -> None:
        """Log the sparsity, as often as the trainer logs."""
        if self.sparsifier is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("sparsity", self.sparsifier.sparsity())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave exact zeros in the module."""
        if self.sparsifier is not None:
            self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into a checkpoint."""
        going = self.sparsifier is not None and not self.sparsifier.finalized
        return {"sparsifier": self.sparsifier.state_dict()} if going and self.sparsifier is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning takes out of a checkpoint, before training begins."""
        self._loaded = state_dict.get("sparsifier")
