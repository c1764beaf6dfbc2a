"""Every kernel of every instruction set that this CPU has, on every input, against the tables."""

from collections.abc import Iterator
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest

from rarefy import act, kernels
from rarefy.act.fit.quartic import fit_quartic
from rarefy.act.kernels import native
from rarefy.act.spec import formats, oracle, quartic, reference

ISAS = sorted({kernel.isa for kernel in kernels.table() if kernel.supported and kernel.name == "act_lut16"})
KTANH = {f: act.load("tanh_bf16_ktanh").to_format(f) for f in ("bf16", "fp16", "fp32")}
TABLES = [act.load(name) for name in act.list_tables()] + [KTANH["fp16"]]


def steps(program: native.KernelSteps) -> Iterator[tuple[str, native.KernelSteps]]:
    """One program for each kernel that runs the table under the present instruction set."""
    for step in program.steps:
        if native.find(step[0]) is not None:
            yield step[0], native.KernelSteps(program.dtype, (step,))


def run(program: native.KernelSteps, x: npt.NDArray[Any], threads: int = 1) -> npt.NDArray[Any]:
    y = np.empty_like(x)
    program.run(x, y, threads)
    return y


def test_the_library_is_built_and_has_a_vector_kernel_for_this_cpu():
    assert "portable" in ISAS
    assert len(ISAS) > 1
    names = {kernel.name for kernel in kernels.table() if kernel.supported}
    assert {"act_linear16", "act_shift16", "act_hard16", "act_lut16", "act_lut8", "act_shift32", "act_tanh32"} <= names


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_every_input(table, isa):
    bits = table.fmt.all_bits()
    want = table.compute(bits)
    program = native.for_table(table)
    with kernels.forced(isa):
        ran = {name: run(each, bits.astype(want.dtype)) for name, each in steps(program)}
    assert ran
    for name, got in ran.items():
        assert np.array_equal(got, want), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", oracle.TABLED[1:])
def test_gates_on_every_input(function, isa):
    bits = np.arange(65536, dtype=np.uint16)
    want = act.load(f"{function}_bf16").compute(bits)
    with kernels.forced(isa):
        names = [name for name, _ in steps(native.gate(function, want))]
        assert (f"act_{function}_bf16" in names) == isa.startswith("avx512")
        for _, program in steps(native.gate(function, want)):
            assert np.array_equal(run(program, bits), want)
            # in another order, so that common and rare inputs share a vector
            shuffled = np.random.default_rng(0).permutation(bits)
            assert np.array_equal(run(program, shuffled), want[shuffled])


def test_vector_kernels_run_the_tables_they_are_for():
    first = {t.name: native.for_table(t).steps[0][0] for t in TABLES}
    assert first["tanh_bf16"] == "act_linear16"
    assert first["tanh_bf16_ktanh"] == first["tanh_bf16_monotone"] == first["tanh_bf16_ktanh_fp16"] == "act_shift16"
    assert first["tanh_bf16_carry64"] == "act_lut16"
    assert native.for_table(KTANH["fp32"]).steps[0][0] == "act_shift32"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_hard_on_every_input(fmt, isa):
    f = formats.get(fmt)
    bits = f.all_bits()
    u = bits & 0x7FFF
    want = np.where(f.is_nan(bits), bits, np.minimum(u, f.one) | (bits & 0x8000))
    program = native.KernelSteps(np.uint16, (("act_hard16", native.hard16(fmt)),))
    with kernels.forced(isa):
        if native.find("act_hard16") is not None:
            assert np.array_equal(run(program, bits.astype(np.uint16)), want)
        else:
            assert isa == "portable"


def float_inputs() -> npt.NDArray[np.uint32]:
    """Every exponent with dense mantissas, both signs, and the special values."""
    rng = np.random.default_rng(0)
    exponent = np.arange(256, dtype=np.uint32)[:, None] << 23
    mantissa = np.unique(
        np.concatenate([np.arange(0, 1 << 23, 2053), rng.integers(0, 1 << 23, 2000), [1, (1 << 23) - 1]])
    )
    u = (exponent | mantissa.astype(np.uint32)).reshape(-1)
    # densely where tanh bends
    u = np.concatenate([u, np.arange(0x3D000000, 0x41200000, 61, dtype=np.uint32)])
    return np.concatenate([u, u | np.uint32(0x80000000)])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_float32(isa):
    x = float_inputs()
    nan = formats.FP32.is_nan(x)
    with kernels.forced(isa):
        assert np.array_equal(run(native.for_table(KTANH["fp32"]), x), KTANH["fp32"].compute(x))
        exact = quartic.tanh()
        got, want = run(native.quartic(exact), x), exact.compute(x)
    assert np.array_equal(got[~nan], want[~nan])
    assert np.isnan(got[nan].view(np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("function", oracle.TABLED[1:])
def test_float32_gates_keep_their_bounds(function, mode, isa):
    # the worst that a search over all inputs found, and all around
    worst = np.array([-15.59657, -5.9408102, -1.8548528, -5.47592831, -87.7411652, -13.1899738], dtype=np.float32)
    near = (worst.view(np.uint32)[:, None] + np.arange(-200, 200)).astype(np.uint32).reshape(-1)
    special = np.array([0x7F800000, 0xFF800000, 0, 0x80000000], dtype=np.uint32)
    x = np.concatenate([float_inputs()[::3], near, special])
    nan = formats.FP32.is_nan(x)
    with kernels.forced(isa):
        got = run(native.float32(function, mode), x)
    assert np.isnan(got[nan].view(np.float32)).all()
    wide = formats.FP32.decode(x[~nan])
    y, true = formats.FP32.decode(got[~nan]), oracle.evaluate(function, wide)
    assert np.array_equal(y[~np.isfinite(true)], true[~np.isfinite(true)])
    assert np.array_equal(np.signbit(y), np.signbit(true))
    assert (reference.ulps(y, true) <= reference.bound32(function, mode, wide)).all()


@pytest.mark.slow
def test_float32_tanh_keeps_its_bounds():
    x = float_inputs()
    x = x[~formats.FP32.is_nan(x)]
    y = formats.FP32.decode(quartic.tanh().compute(x))
    true = np.tanh(formats.FP32.decode(x))
    assert np.abs(y - true).max() <= quartic.MAX_ABS
    last_place = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(true), 1e-45))), -126.0) - 23.0)
    assert (np.abs(y - true) / last_place).max() <= quartic.MAX_ULP
    assert np.abs(y).max() == 1.0
    assert np.array_equal(np.signbit(y), x >= 0x80000000)
    assert (np.diff(quartic.tanh().compute(np.sort(x[x < 0x80000000])).astype(np.int64)) >= 0).all()


def test_float32_coefficients_are_what_the_fit_makes():
    made, shipped = fit_quartic(), quartic.tanh()
    assert made == shipped
    assert quartic.Quartic.from_json(shipped.to_json()) == shipped
    with pytest.raises(ValueError, match="5 rows of 32"):
        quartic.Quartic(shipped.coefficients[:4])


def test_fused_multiply_add_is_rounded_once():
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=3000).astype(np.float32) for _ in "ab")
    c = (-(a.astype(np.float64) * b) * rng.choice([1, 1 + 2.0**-20, 2.0**-30, 2.0**30], 3000)).astype(np.float32)
    with mpmath.workprec(200):
        for x, y, z, got in zip(a, b, c, quartic.fused(a, b, c), strict=True):
            exact = mpmath.mpf(float(x)) * mpmath.mpf(float(y)) + mpmath.mpf(float(z))
            with mpmath.workprec(24):
                assert float(+exact) == float(got)


@pytest.mark.parametrize("isa", ISAS)
def test_tails_alignments_and_in_place(isa):
    rng = np.random.default_rng(1)
    programs = [
        native.for_table(act.load("tanh_bf16")),
        native.for_table(KTANH["bf16"]),
        native.for_table(act.load("silu_fp16")),
        native.gate("gelu", act.load("gelu_bf16").compute(np.arange(65536))),
        native.for_table(act.load("silu_e4m3fn")),
        native.for_table(KTANH["fp32"]),
        native.quartic(quartic.tanh()),
    ]
    with kernels.forced(isa):
        for program in programs:
            size = np.dtype(program.dtype).itemsize
            bits = rng.integers(0, 1 << 8 * size, 400, dtype=np.uint32).astype(program.dtype)
            if size == 4:
                bits &= np.uint32(0xFF7FFFFF)  # no NaN: their bits are not part of the contract in float32
            whole = run(program, bits)
            for n in range(258):
                begin = n % 7
                room = np.full(n + begin + 8, 0x5A, dtype=program.dtype)
                out = room[begin : begin + n]
                program.run(bits[:n], out)
                assert np.array_equal(out, whole[:n])
                assert (room[:begin] == 0x5A).all()
                assert (room[begin + n :] == 0x5A).all()
                out[:] = bits[:n]
                program.run(out, out)
                assert np.array_equal(out, whole[:n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_give_the_same(isa, threads):
    bits = np.random.default_rng(2).integers(0, 1 << 16, (1 << 21) + 4321, dtype=np.uint16)
    program = native.for_table(act.load("tanh_bf16"))
    with kernels.forced(isa):
        assert np.array_equal(run(program, bits, threads), act.load("tanh_bf16").compute(bits))


def test_tables_that_a_kernel_cannot_run_are_left_to_lookups():
    table = act.load("tanh_bf16")
    assert native.linear16(table) is not None
    assert native.linear16(act.load("tanh_bf16_ktanh")) is None
    assert native.shift(table) is None
    assert native.shift(act.load("tanh_bf16_carry64")) is None
    assert native.for_table(act.load("tanh_bf16_carry64").to_format("fp32")).steps == ()


def test_no_kernel_is_an_error():
    program = native.for_table(act.load("tanh_bf16"))
    with kernels.forced("pytorch"), pytest.raises(RuntimeError, match="act_linear16, act_lut16"):
        run(program, np.zeros(3, np.uint16))


@pytest.mark.parametrize("function", oracle.TABLED)
def test_a_changed_answer_is_caught(function):
    """The exhaustive comparison sees a single wrong bit."""
    table = act.load(f"{function}_bf16")
    answers = table.compute(np.arange(65536)).copy()
    answers[0x3F80] ^= 1
    assert not np.array_equal(
        run(native.lookup("bf16", answers), np.arange(65536, dtype=np.uint16)), table.compute(np.arange(65536))
    )
