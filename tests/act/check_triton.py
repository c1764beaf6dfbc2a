"""The Triton kernels in Triton's interpreter, on every input: ``make test-triton`` runs this file."""

import os
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from rarefy import kernels
from rarefy.act import gated, gradients
from rarefy.act.kernels import aten, gated_gpu, gpu, triton
from rarefy.act.spec import oracle, reference
from rarefy.act.spec.table import load

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy's, in the interpreter

CPU = torch.device("cpu")
CASES = [(function, mode) for function in oracle.FUNCTIONS for mode in reference.modes(function)]
SMALL = [dtype for dtype, fmt in aten.FORMAT_OF.items() if fmt.bits <= 16]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
FLOAT32 = sorted({*range(0, 2**31, 9_973), *(2**n + d for n in range(32) for d in (-1, 0, 1)), 0x7F800000, 0x7FFFFFFF})


def every(dtype):
    fmt = aten.FORMAT_OF[dtype]
    return torch.from_numpy(fmt.all_bits().astype(fmt.dtype)).view(dtype)


def floats():
    """Float32 numbers of both signs: all exponents, the edges, what lies about powers of two, and NaN."""
    u = np.array([u for u in FLOAT32 if u < 2**31], dtype=np.uint32)
    return torch.from_numpy(np.concatenate([u, u | np.uint32(2**31)])).view(torch.float32)


def run(kernel, *tensors):
    y = torch.empty_like(tensors[-1])
    kernel(*tensors, y)
    return y


def same(got, expected):
    """Compare bits; one NaN is as good as another."""
    assert got.dtype == expected.dtype
    integer = INTEGER[got.element_size()]
    wrong = (got.view(integer) != expected.view(integer)) & ~(got.float().isnan() & expected.float().isnan())
    assert not wrong.any(), (int(wrong.sum()), got[wrong][:5], expected[wrong][:5])


@pytest.fixture
def long(monkeypatch):
    """Long programs: the interpreter's time is one of programs."""
    for size in gpu.BLOCK:
        monkeypatch.setitem(gpu.BLOCK, size, 1 << 16)


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_every_input(function, mode, dtype):
    x = every(dtype)
    got = run(triton.forward(function, mode, dtype, "", CPU), x)
    integer = INTEGER[got.element_size()]
    assert torch.equal(got.view(integer), aten.activation(x, function, mode).view(integer))


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_float32(function, mode):
    x = floats()
    got = run(triton.forward(function, mode, torch.float32, "", CPU), x)
    expected = aten.activation(x, function, mode)
    same(got, expected)
    assert torch.equal(got.isnan(), x.isnan())


def cases(small):
    """Yield every function, mode, form of gradient and dtype of which PyTorch has not one operator."""
    for function, mode in CASES:
        for grad in gradients.forms(function, mode):
            for dtype in SMALL if small else [torch.float32]:
                if not gradients.is_one_operator(function, mode, grad, dtype):
                    yield function, mode, grad, dtype


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize(("function", "mode", "grad", "dtype"), list(cases(small=True)), ids=str)
def test_every_gradient(function, mode, grad, dtype):
    saved = every(dtype)
    upstream = [torch.ones(saved.shape), torch.randn(saved.shape, generator=torch.Generator().manual_seed(0))]
    if dtype.itemsize == 1:  # every pair
        saved, upstream = saved.repeat(256), [every(dtype).float().repeat_interleave(256)]
    kernel = triton.backward(function, mode, grad, dtype, CPU)
    for given in (each.to(dtype) for each in upstream):
        expected = gradients.backward(given, saved, function, mode, grad)
        got = run(kernel, given, saved)
        same(got, expected)


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize(("function", "mode", "grad", "dtype"), list(cases(small=False)), ids=str)
def test_float32_gradients(function, mode, grad, dtype):
    saved = floats()
    upstream = torch.randn(saved.shape, generator=torch.Generator().manual_seed(0))
    got = run(triton.backward(function, mode, grad, dtype, CPU), upstream, saved)
    expected = gradients.backward(upstream, saved, function, mode, grad)
    if mode == "hard":
        same(got, expected)
    else:  # exp is another one, and some slopes pass zero
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.usefixtures("long")
def test_tables():
    x = torch.randn(1027).bfloat16()
    for name in ("tanh_bf16_monotone", "tanh_bf16_carry64", "tanh_bf16", "tanh_bf16_shifts"):
        same(run(triton.forward("tanh", "ktanh", x.dtype, name, CPU), x), aten.activation(x, "tanh", "ktanh", name))
    wide = load("tanh_bf16_monotone").to_format("fp32").to_json()
    for function in (function for function, mode in CASES if mode == "ktanh"):
        x = floats()
        got = run(triton.forward(function, "ktanh", x.dtype, wide, CPU), x)
        same(got, aten.activation(x, function, "ktanh", wide))
    segments = load("tanh_bf16_shifts").to_format("fp32").to_json()
    assert triton.forward("tanh", "ktanh", torch.float32, segments, CPU) is None


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32], ids=str)
def test_tails_and_places(dtype):
    forward = triton.forward("tanh", "hard", dtype, "", CPU)
    backward = triton.backward("tanh", "hard", "x", dtype, CPU)
    block = gpu.BLOCK[dtype.itemsize]
    for n in (0, 1, 2, 41, block - 1, block, block + 1, 2 * block + 17):
        for start in (0, 1):  # at a multiple of 16 bytes or not
            x, upstream = (torch.randn(2 * block + 99).to(dtype)[start:] for _ in range(2))
            room = torch.full(x.shape, 7.0).to(dtype)
            forward(x[:n], room[:n])
            same(room[:n], aten.activation(x[:n], "tanh", "hard"))
            assert (room[n:].float() == 7.0).all()
            backward(upstream[:n], x[:n], room[:n])
            same(room[:n], gradients.backward(upstream[:n], x[:n], "tanh", "hard", "x"))
            assert (room[n:].float() == 7.0).all()
            forward(x[:n], x[:n])
            assert (x[:n].float().abs() <= 1).all()


UNITS = [(function, mode) for function in ("silu", "gelu", "gelu_tanh") for mode in reference.MODES]


def unit(back, given, found, function, mode):
    assert gated_gpu.run(back, given, found, function, mode, "")
    return found


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("dtype", gated.DTYPES, ids=str)
@pytest.mark.parametrize(("function", "mode"), UNITS)
def test_gated(function, mode, dtype):
    gate = floats() if dtype == torch.float32 else every(dtype)
    up, upstream = (
        torch.randn(gate.shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)
    )
    with kernels.forced("pytorch"):
        expected = gated.forward(gate, up, function, mode, "")
        gradient = gated.backward(upstream, gate, up, function, mode, "")
    (got,) = unit(False, (gate, up), (torch.empty_like(gate),), function, mode)
    same(got, expected)
    for one, other in zip(
        unit(True, (upstream, gate, up), (torch.empty_like(gate), torch.empty_like(up)), function, mode),
        gradient,
        strict=True,
    ):
        same(one, other)


@pytest.mark.parametrize("dtype", gated.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 32), (2, 2080), (5, 26), (3, 1), (1, 4096), (2, 3, 1042)])
def test_gated_halves(shape, dtype):
    """Rows of multiples of 16 and others, longer than a program and shorter."""
    x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)
    upstream = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    with kernels.forced("pytorch"):
        expected = gated.forward(x, None, "silu", "exact", "")
        gradient = gated.backward(upstream, x, None, "silu", "exact", "")
    halves, found = gated.halves(x, None), torch.full_like(x, 7.0)
    (got,) = unit(False, halves, (torch.empty(shape, dtype=dtype),), "silu", "exact")
    same(got, expected)
    unit(True, (upstream, *halves), gated.halves(found, None), "silu", "exact")
    same(found, gradient[0])


COMPILED = """
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rarefy.act.kernels import gpu, triton_gated
from rarefy.act.kernels import triton as forms

KINDS = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.float32: "*fp32"}


def program(kernel, tensors, sizes=1):
    pointers = [KINDS[kernel.integer]] * tensors + [KINDS[table.dtype] for table in kernel.tables]
    types = pointers + ["i64"] * sizes
    constants = [*kernel.constants, kernel.block]
    signature = dict(zip(kernel.jit.arg_names, types + ["constexpr"] * len(constants), strict=True))
    fixed = {(len(types) + i,): value for i, value in enumerate(constants)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel.jit, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gpu.OPTIONS).asm["ptx"]


cpu, found = torch.device("cpu"), []
for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32):
    for function, mode in (("tanh", "exact"), ("tanh", "ktanh"), ("gelu", "exact"), ("gelu", "hard")):
        found.append((program(forms.forward(function, mode, dtype, "", cpu), 2), 1, 1))
    found.append((program(forms.backward("tanh", "exact", "x", dtype, cpu), 3), 2, 1))
for dtype in (torch.bfloat16, torch.float32):
    for many in (False, True):
        found.append((program(triton_gated.forward("gelu_tanh", "exact", dtype, "", cpu, many), 3, 3), 2, 1))
        found.append((program(triton_gated.backward("gelu_tanh", "exact", dtype, "", cpu, many), 5, 5), 3, 2))
for text, loads, stores in found:
    assert len(re.findall(r"ld[.]global[.]v4[.]b32", text)) >= loads, text
    assert len(re.findall(r"st[.]global[.]v4[.]b32", text)) >= stores, text
    assert "fma.rn.f64" not in text, text
    assert "div.full.f32" not in text, text
print(len(found))
"""


@pytest.mark.slow
def test_programs_for_a_gpu():
    """They compile without one; they move 16 bytes at a time, and join and shorten nothing in float64 and division."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "33", ended.stderr[-3000:]
