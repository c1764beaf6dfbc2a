"""The native table, its loader and the way round it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy import kernels
from rarefy.kernels import _thresholds_native


def test_the_best_instruction_set_comes_first_and_training_has_a_portable_one():
    order = ["avx512_vbmi2", "avx512", "avx2", "neon", "portable"]
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


def test_unknown_kernel_is_none():
    assert kernels.find("no_such_kernel", None) is None


def test_a_library_that_does_not_load_is_as_none():
    program = (
        "import pathlib, tempfile, warnings, rarefy.kernels as k; folder = tempfile.mkdtemp();"
        "pathlib.Path(folder, 'librarefy.so').write_bytes(b'not a library'); k.__path__ = [folder]\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always'); assert k.table() == ()\n"
        "assert 'does not load, so everything runs in PyTorch' in str(told[0].message)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_chunk_is_the_same_on_both_sides():
    header = (Path(__file__).parents[2] / "native" / "include" / "rarefy.h").read_text()
    shift = int(re.search(r"RAREFY_CHUNK = 1 << (\d+)", header)[1])
    assert 1 << shift == _thresholds_native.CHUNK
