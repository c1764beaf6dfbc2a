"""A transformer's activations replaced by exact ones: python examples/swap_activations.py."""

import torch
from torch import nn

from rarefy import act

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, activation=nn.GELU(), batch_first=True)
head = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), head).bfloat16().eval()

x = torch.randn(8, 16, 64).bfloat16()
before = model(x)
report = act.swap(model)  # mode="ktanh" is the paper's table, mode="hard" the control
print(report)
print(f"largest change: {(model(x) - before).abs().max():.1e}")
report.restore()
assert torch.equal(model(x), before)

# How far a table is from the true function, over every bfloat16 number.
every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
every = every[every.isfinite()]
for mode in ("exact", "ktanh", "hard"):
    error = act.tanh(every, mode).double() - every.double().tanh()
    print(f"tanh, {mode}: largest error {error.abs().max():.5f}")
