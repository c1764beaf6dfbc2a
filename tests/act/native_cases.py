"""Write the cases of ``native/tests/exhaustive.cpp``: ``python -m tests.act.native_cases FILE``."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy import act, kernels
from rarefy.act.kernels import native
from rarefy.act.spec import formats, oracle, quartic

Case = tuple[str, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def cases() -> list[Case]:
    """(kernel, input, answer, table): every kernel, all inputs, repeated where threads need more of them."""
    found: list[Case] = []
    published = act.load("tanh_bf16_ktanh")
    for table in [*(act.load(name) for name in act.list_tables()), published.to_format("fp16")]:
        fmt = table.fmt
        bits = np.tile(fmt.all_bits(), 33 if table.name == "tanh_bf16" else 1).astype(fmt.dtype)
        found += [(name, bits, table.compute(bits), block) for name, block in native.for_table(table).steps]
    bits = np.arange(65536, dtype=np.uint16)
    for function in oracle.TABLED[1:]:
        answers = act.load(f"{function}_bf16").compute(bits)
        found += [(name, bits, answers, block) for name, block in native.gate(function, answers).steps]
    for fmt in (formats.BF16, formats.FP16):
        hard = np.where(fmt.is_nan(bits), bits, np.minimum(bits & 0x7FFF, fmt.one) | (bits & 0x8000)).astype(np.uint16)
        found.append(("act_hard16", bits, hard, native.hard16(fmt.name)))
    rng = np.random.default_rng(0)
    u = np.concatenate([rng.integers(0, 1 << 32, 300_000, dtype=np.uint32), np.arange(0x3D000000, 0x41200000, 997)])
    u = u[~formats.FP32.is_nan(u)].astype(np.uint32)
    wide = published.to_format("fp32")
    found += [(name, u, wide.compute(u), block) for name, block in native.for_table(wide).steps]
    tanh = quartic.tanh()
    found += [(name, u, tanh.compute(u), block) for name, block in native.quartic(tanh).steps]
    # These have no table: every instruction set gives what plain C does.
    for function in oracle.FUNCTIONS[1:]:
        for mode in ("exact", "fast") if function in oracle.TABLED else ("exact",):
            program, y = native.float32(function, mode), np.empty_like(u)
            with kernels.forced("portable"):
                program.run(u, y)
            found += [(name, u, y, block) for name, block in program.steps]
    return found


def write(path: Path) -> None:
    """The number of cases, then for each: name, width of a value, input, answer, table; a size before every block."""
    with path.open("wb") as file:

        def number(value: int) -> None:
            file.write(np.int64(value).tobytes())

        def block(data: bytes) -> None:
            number(len(data))
            file.write(data)

        every = cases()
        number(len(every))
        for name, x, y, table in every:
            block(name.encode())
            number(x.itemsize)
            block(x.tobytes())
            block(y.astype(x.dtype).tobytes())
            block(table.tobytes())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
