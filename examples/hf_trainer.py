"""A small BERT, sparse in the Trainer of transformers: python examples/hf_trainer.py FOLDER."""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from rarefy import AutoSparse
from rarefy.integrations.hf import SparsifierCallback

folder = sys.argv[1]
torch.manual_seed(0)
shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **shape))
data = [{"input_ids": row, "labels": int(row[0] > 50)} for row in torch.randint(100, (256, 16))]


def make(model, total_steps):
    """The sparsifier, once the trainer knows how many steps it takes; what classifies stays dense."""
    return AutoSparse(model, target=0.8, total_steps=total_steps, exclude=["classifier"])


arguments = TrainingArguments(
    folder, num_train_epochs=2, learning_rate=1e-3, logging_steps=32, save_steps=64, report_to="none", use_cpu=True
)
callback = SparsifierCallback(make)
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on from the last checkpoint
trainer.save_model(f"{folder}/sparse")
print(f"{100 * callback.sparsifier.sparsity():.1f} % zeros")
