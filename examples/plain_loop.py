"""A classifier trains itself to 90 % zeros in a loop of its own: python examples/plain_loop.py."""

import torch
import torch.nn.functional as F
from torch import nn

from rarefy import AutoSparse

torch.manual_seed(0)
images = torch.randn(2048, 64)
labels = (images @ torch.randn(64, 10)).argmax(1)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

steps = 300
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
sparsifier = AutoSparse(model, target=0.9, total_steps=steps).attach(optimizer)

for step in range(steps):
    pick = torch.randint(len(images), (128,))
    optimizer.zero_grad()
    F.cross_entropy(model(images[pick]), labels[pick]).backward()
    optimizer.step()
    schedule.step()
    if step % 100 == 99:
        print(f"step {step + 1}: {100 * sparsifier.sparsity():.1f} % zeros")

model = sparsifier.finalize()
accuracy = (model(images).argmax(1) == labels).float().mean()
print(f"{100 * sparsifier.sparsity():.1f} % zeros, {100 * accuracy:.1f} % accuracy on the training set")
