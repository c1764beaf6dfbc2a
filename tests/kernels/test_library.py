"""The native table, its loader and the way round it."""

import pytest

from rarefy import kernels


def test_every_kernel_has_a_portable_form_and_the_best_comes_first():
    order = ["avx512_vbmi2", "avx512", "avx2", "neon", "portable"]
    names = {kernel.name for kernel in kernels.table()}
    assert {"soft_threshold_f32", "soft_threshold_backward_f32", "count_above_f32"} <= names
    for name in names:
        isas = [kernel.isa for kernel in kernels.table() if kernel.name == name]
        assert isas == sorted(isas, key=order.index)
        assert isas[-1] == "portable"
        assert next(kernel.supported for kernel in kernels.table() if kernel.name == name and kernel.isa == "portable")


def test_forced_path():
    with kernels.forced("pytorch"):
        assert kernels.find("soft_threshold_f32", None) is None
    with kernels.forced("portable"):
        assert kernels.find("soft_threshold_f32", None) is not None
    with kernels.forced("sse9"), pytest.raises(ValueError, match="RAREFY_ISA must be one of.*portable.*got 'sse9'"):
        kernels.find("soft_threshold_f32", None)


def test_unknown_kernel_is_none():
    assert kernels.find("no_such_kernel", None) is None
