"""A classifier, sparse in the Trainer of Lightning: python examples/lightning_trainer.py FOLDER."""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy import AutoSparse
from rarefy.integrations.lightning import SparsifierCallback


class Classifier(L.LightningModule):
    """Two layers, as anybody would write them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, index):
        """The loss of a batch."""
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        """Nothing of the sparsifier is in here."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


torch.manual_seed(0)
images = torch.randn(2048, 64)
loader = DataLoader(TensorDataset(images, (images @ torch.randn(64, 10)).argmax(1)), batch_size=64, shuffle=True)
callback = SparsifierCallback(lambda model, total_steps: AutoSparse(model, target=0.9, total_steps=total_steps))
settings = {"max_epochs": 4, "log_every_n_steps": 8, "accelerator": "cpu"}
trainer = L.Trainer(callbacks=[callback], default_root_dir=sys.argv[1], **settings)
trainer.fit(Classifier(), loader)  # fit(..., ckpt_path="last") goes on from the last checkpoint
print(f"{100 * callback.sparsifier.sparsity():.1f} % zeros")
