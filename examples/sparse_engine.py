"""A convolutional network becomes sparse, then an engine in a file: python examples/sparse_engine.py FOLDER."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from rarefy import AutoSparse, engine

torch.manual_seed(0)
images = torch.rand(512, 1, 16, 16)
labels = images.mean((1, 2, 3)).gt(0.5).long()
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)),
)

steps = 100
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
sparsifier = AutoSparse(model, target=0.8, total_steps=steps).attach(optimizer)
for _ in range(steps):
    pick = torch.randint(len(images), (64,))
    optimizer.zero_grad()
    F.cross_entropy(model(images[pick]), labels[pick]).backward()
    optimizer.step()
model = sparsifier.finalize().eval()
print(f"{100 * sparsifier.sparsity():.1f} % zeros")

compiled = engine.compile(model, images[:1])
print(compiled.profile())
engine.save(compiled, f"{sys.argv[1]}/network.engine")
again = engine.load(f"{sys.argv[1]}/network.engine")
print(f"largest difference from PyTorch: {(again(images) - model(images)).abs().max():.1e}")
