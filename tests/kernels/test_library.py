"""The native table, its loader and the way round it."""

import _ctypes
import hashlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rarefy import kernels
from rarefy.kernels import _library, _thresholds_native


def test_the_best_instruction_set_comes_first_and_training_has_a_portable_one():
    order = ["amx_bf16", "avx512_vbmi2", "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "portable"]
    names = {kernel.name for kernel in kernels.table()}
    training = {"thresholds_before_f32", "thresholds_after_f32", "thresholds_count_f32", "mask_f32"}
    assert training <= names
    for name in names:
        isas = [kernel.isa for kernel in kernels.table() if kernel.name == name]
        assert isas == sorted(isas, key=order.index)
        if name in training:
            assert isas[-1] == "portable"
    assert all(kernel.supported for kernel in kernels.table() if kernel.isa == "portable")


def test_forced_path():
    with kernels.forced("pytorch"):
        assert kernels.find("mask_f32", None) is None
    with kernels.forced("portable"):
        assert kernels.find("mask_f32", None) is not None
    with kernels.forced("sse9"), pytest.raises(ValueError, match="RAREFY_ISA must be one of.*portable.*got 'sse9'"):
        kernels.find("mask_f32", None)


@pytest.mark.parametrize("isa", sorted({k.isa for k in kernels.table() if k.supported}))
def test_an_instruction_set_brings_the_kernels_of_its_base(isa):
    with kernels.forced(isa):
        used = kernels.in_use()
    built = {(k.name, k.isa) for k in kernels.table()}
    chain = kernels.chain(isa)
    assert used.keys() == {name for name, each in built if each in chain}
    assert all(k.isa == next(each for each in chain if (k.name, each) in built) for k in used.values())
    assert {"mask_f32", "act_tanh32", "engine"} <= used.keys()


def test_an_instruction_set_is_that_of_the_kernels_that_it_is_for():
    chains = {isa: kernels.chain(isa) for isa in ("amx_bf16", "avx_vnni", "avx2", "portable")}
    assert chains == {
        "amx_bf16": ("amx_bf16", "avx512_vbmi2", "avx512"),
        "avx_vnni": ("avx_vnni", "avx2"),
        "avx2": ("avx2",),
        "portable": ("portable",),
    }
    only = {k.name for k in kernels.table() if k.isa == "amx_bf16"}
    assert only in (set(), {"lstm_bf16", "gru_bf16", "lstm_backward_bf16", "gru_backward_bf16"})


# A stack for signals that has no room for tiles, for which the system refuses them; the kernels are asked for after it.
REFUSED = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
room = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
import torch
from rarefy import act, kernels
print(*{k.isa for k in kernels.table() if k.supported}, kernels.in_use()["lstm_bf16"].isa)
act.LSTM(64, 64, dtype=torch.bfloat16)(torch.zeros(2, 8, 64, dtype=torch.bfloat16))
"""


@pytest.mark.skipif(
    not any(k.isa == "amx_bf16" and k.supported for k in kernels.table()), reason="no AMX, or no permission for it"
)
def test_amx_is_used_only_where_the_system_lets():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    assert "amx_bf16" not in done.stdout.split()
    assert done.stdout.split()[-1] == "avx512_vbmi2"


def test_unknown_kernel_is_none():
    assert kernels.find("no_such_kernel", None) is None


LIBRARY = kernels.library_path()
WHOLE = b"" if LIBRARY is None else LIBRARY.read_bytes()
ALTERED = "it is not what librarefy.so.sha256 says; install rarefy again"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install these bytes as the library, with the checksum of the right one; None: install nothing."""
    caches = (_library._library, _library.table, _library._function)

    def install(content):
        if content is not None:
            (tmp_path / "librarefy.so").write_bytes(content)
            (tmp_path / "librarefy.so.sha256").write_text(hashlib.sha256(WHOLE).hexdigest() + "\n")
        monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
        for cached in caches:
            cached.cache_clear()
        return tmp_path

    yield install
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "rarefy has no native library here (it was built without a C++ compiler)"),
        (b"", ALTERED),
        (b"not a library", ALTERED),
        (WHOLE[: len(WHOLE) // 2], ALTERED),
        (WHOLE[:-1] + b"?", ALTERED),
    ],
    ids=["missing", "empty", "text", "half", "one-byte"],
)
def test_a_library_that_is_not_whole_is_as_none_and_one_warning_says_why(content, why, installed):
    installed(content)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert kernels.table() == ()
        assert kernels.find("mask_f32", None) is None
    (message,) = [str(each.message) for each in told]
    assert why in message
    assert "so everything runs in PyTorch" in message


def test_a_library_of_something_else_is_as_none(installed):
    folder = installed(None)
    (folder / "librarefy.so").symlink_to(_ctypes.__file__)
    with pytest.warns(UserWarning, match="does not load, so everything runs in PyTorch: .*rarefy_kernels"):
        assert kernels.table() == ()


@pytest.mark.skipif(LIBRARY is None, reason="no native library was built")
def test_a_whole_library_loads_without_a_word(installed):
    installed(WHOLE)
    assert len(kernels.table()) > 3


@pytest.mark.slow
def test_with_half_a_library_training_and_the_engine_are_ordinary(installed):
    folder = installed(WHOLE[: len(WHOLE) // 2])
    program = f"""
import warnings, torch, rarefy
from rarefy import act, engine, kernels
kernels.__path__ = [{str(folder)!r}]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), torch.randn(4, 8)
    sparsifier = rarefy.AutoSparse(model, total_steps=2, target=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    sparsifier.finalize()
    assert int((model[0].weight == 0).sum()) == 32
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(engine.compile(model, x)(x), model(x))
    assert torch.allclose(act.tanh(x), x.tanh())
print(sum("so everything runs in PyTorch" in str(each.message) for each in told))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_chunk_is_the_same_on_both_sides():
    header = (Path(__file__).parents[2] / "native" / "include" / "rarefy.h").read_text()
    shift = int(re.search(r"RAREFY_CHUNK = 1 << (\d+)", header)[1])
    assert 1 << shift == _thresholds_native.CHUNK
