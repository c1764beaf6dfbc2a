"""``rarefy bench act``: the activation functions against PyTorch, SLEEF, HardTanh and memcpy, in one interleaved run.

One pinned thread. Every entry runs for a few milliseconds in each round, all entries in turn, and the median over
rounds counts: what disturbs the machine for a while disturbs all alike. The clock is the processor time of the thread,
so that turns of other programs on the core do not count. ``kernel`` entries are native functions in a loop of C,
``call`` entries go through Python into an existing output (``out=``), as PyTorch's do. Inputs are N(0, 2).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy import act, kernels
from rarefy.act.kernels import launch, native
from rarefy.act.spec import reference
from rarefy.act.spec.oracle import TABLED
from rarefy.bench import gated
from rarefy.environment import provenance

#: Elements of 16 bits; float32 arrays have half as many. Two arrays of the size fit into that level on common CPUs.
SIZES = {"L1": 1 << 13, "L2": 1 << 17, "DRAM": 1 << 25}
_SLICE = 2e6  # nanoseconds an entry runs in a round

Timer = Callable[[int], float]  # repetitions -> nanoseconds


@dataclass(frozen=True)
class Measured:
    """One entry at one size: median and least time over the rounds, in nanoseconds an element (a call for "call8")."""

    size: str
    dtype: str
    entry: str
    ns: float
    least_ns: float


@dataclass(frozen=True)
class Target:
    """A claim: what was measured, and the bound it is held to ("at least" when ``least``, else "at most")."""

    claim: str
    value: float
    bound: float
    least: bool

    @property
    def met(self) -> bool:
        """Whether the measured value keeps the bound."""
        return self.value >= self.bound if self.least else self.value <= self.bound


class Peers:
    """The C functions to compare with and the clock, compiled on the spot; absent without a compiler or the sources."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.sleef = False
        self.alive: list[object] = []  # tables that timers point to
        source = Path(__file__).parents[3] / "native" / "bench" / "act_peers.c"
        if not source.is_file():
            return
        with tempfile.TemporaryDirectory() as folder:
            for extra in (["-DPEER_SLEEF", "-lsleef"], []):
                target = Path(folder) / f"peers{len(extra)}.so"
                command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(target), *extra]
                try:
                    subprocess.run(command, check=True, capture_output=True)
                except (OSError, subprocess.CalledProcessError):
                    continue
                self.library, self.sleef = ctypes.CDLL(str(target)), bool(extra)
                break
        if self.library is not None:
            self.library.peer_clock.restype = ctypes.c_double
            pointers = [ctypes.c_void_p] * 3
            self.library.peer_clock.argtypes = [*pointers, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]

    def timer(self, function: Any, table: int, x: Tensor, y: Tensor) -> Timer:
        """Time a kernel in a loop of C, or of Python when there is no clock."""
        if self.library is None:
            pointers = (x.data_ptr(), y.data_ptr(), x.numel(), table, 1)
            return _python_timer(lambda: function(*pointers))
        clock, address = self.library.peer_clock, ctypes.cast(function, ctypes.c_void_p).value
        return lambda n: float(clock(address, x.data_ptr(), y.data_ptr(), x.numel(), table, n))

    def find(self, name: str) -> Any:
        """Return a peer by name, or None."""
        return getattr(self.library, name, None) if self.library is not None else None


def _python_timer(call: Callable[[], object]) -> Timer:
    def run(n: int) -> float:
        begin = time.thread_time_ns()
        for _ in range(n):
            call()
        return float(time.thread_time_ns() - begin)

    return run


def _kernels(peers: Peers, dtype: torch.dtype, x: Tensor, y: Tensor) -> dict[str, Timer]:
    timers: dict[str, Timer] = {}

    def add(entry: str, steps: native.KernelSteps | None, isa: str | None = None) -> None:
        with kernels.forced(isa):
            kernel = steps.kernel() if steps is not None else None
        if kernel is not None:
            peers.alive.append(steps)
            timers[entry] = peers.timer(*kernel, x, y)

    for function in TABLED:
        for mode in reference.MODES if dtype == torch.float32 else ("exact", "ktanh", "hard"):
            add(f"kernel {function} {mode}", launch.steps_of(function, mode, dtype))
    if dtype == torch.bfloat16:
        table = native.for_table(act.load("tanh_bf16"))
        for isa in ("avx512", "avx2", "portable"):
            add(f"kernel tanh exact {isa}", table, isa)
            add(f"kernel tanh ktanh {isa}", native.for_table(act.load("tanh_bf16_ktanh")), isa)
        answers = native.KernelSteps(table.dtype, table.steps[-1:])
        add("kernel lookup of 65536 answers", answers)
    if dtype == torch.float32:
        for isa in ("avx2", "portable"):
            add(f"kernel tanh exact {isa}", launch.steps_of("tanh", "exact", dtype), isa)
    names = {2: ["memcpy16"], 4: ["memcpy32", "hard32", "sleef_u10", "sleef_u35"]}[x.element_size()]
    for name in names:
        peer = peers.find(f"peer_{name}")
        if peer is not None:
            timers[name.rstrip("1632") if name.startswith("memcpy") else f"peer {name}"] = peers.timer(peer, 0, x, y)
    return timers


def _calls(x: Tensor, y: Tensor, compiled: bool) -> dict[str, Timer]:
    aten = torch.ops.aten
    calls: dict[str, Callable[[], object]] = {
        "torch.tanh": lambda: torch.tanh(x, out=y),
        "torch.sigmoid": lambda: torch.sigmoid(x, out=y),
        "torch.silu": lambda: aten.silu.out(x, out=y),
        "torch.gelu": lambda: aten.gelu.out(x, out=y),
        "torch.gelu_tanh": lambda: aten.gelu.out(x, approximate="tanh", out=y),
        "torch.hardtanh": lambda: aten.hardtanh.out(x, out=y),
        "call tanh exact": lambda: act.tanh(x, out=y),
        "call tanh ktanh": lambda: act.tanh(x, "ktanh", out=y),
        "call sigmoid exact": lambda: act.sigmoid(x, out=y),
        "call silu exact": lambda: act.silu(x, out=y),
        "call gelu exact": lambda: act.gelu(x, out=y),
        "call gelu_tanh exact": lambda: act.gelu(x, approximate="tanh", out=y),
    }
    if compiled and torch._C._has_mkldnn and x.dtype != torch.float16:
        # oneDNN's own kernels work on its own tensors, and have no out=
        theirs = x.to_mkldnn()
        calls |= {"onednn tanh": lambda: torch.tanh(theirs), "onednn sigmoid": lambda: torch.sigmoid(theirs)}
    if compiled:
        for name, function in (("torch.tanh", torch.tanh), ("tanh exact", act.tanh)):
            fast = torch.compile(lambda v, o, f=function: o.copy_(f(v)), fullgraph=True)
            fast(x, y)
            calls[f"inductor {name}"] = lambda fast=fast: fast(x, y)  # type: ignore[misc]
    return timers(calls)


def timers(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timer]:
    """Return what times each call, by entry."""
    return {entry: _python_timer(call) for entry, call in calls.items()}


def interleave(entries: Mapping[str, Timer], elements: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median and the least nanoseconds an element of every entry, measured in turn."""
    repeat = {}
    for entry, timer in entries.items():
        timer(1)
        repeat[entry] = max(1, int(_SLICE / max(timer(2) / 2, 1.0)))
    samples: dict[str, list[float]] = {entry: [] for entry in entries}
    for _ in range(rounds):
        for entry, timer in entries.items():
            samples[entry].append(timer(repeat[entry]) / repeat[entry] / elements)
    return {entry: (statistics.median(values), min(values)) for entry, values in samples.items()}


def run(sizes: Sequence[str] = tuple(SIZES), rounds: int = 21, *, compiled: bool = True) -> list[Measured]:
    """Measure everything at the sizes ("L1", "L2", "DRAM") on one thread; ``compiled`` adds oneDNN and Inductor."""
    unknown = [size for size in sizes if size not in SIZES]
    if unknown or rounds < 1:
        raise ValueError(f"sizes must be among {', '.join(SIZES)} and rounds at least 1, got {unknown or rounds}")
    threads, cores = torch.get_num_threads(), _pin()
    try:
        torch.set_num_threads(1)
        peers, found = Peers(), []
        for size in sizes:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                n = SIZES[size] if dtype != torch.float32 else SIZES[size] // 2
                x = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
                y = torch.zeros_like(x)
                more = compiled and size == "L2"
                entries = _kernels(peers, dtype, x, y) | _calls(x, y, more) | timers(gated.calls(x, more))
                times = interleave(entries, n, rounds if size != "DRAM" else max(3, rounds // 3))
                found += [Measured(size, str(dtype).removeprefix("torch."), e, *t) for e, t in times.items()]
        x = torch.randn(8).to(torch.bfloat16)
        small = {"torch.tanh": lambda: torch.tanh(x), "act.tanh": lambda: act.tanh(x), "act.silu": lambda: act.silu(x)}
        times = interleave(timers(small), 1, rounds)
        return found + [Measured("call8", "bfloat16", e, *t) for e, t in times.items()]
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def _pin() -> set[int]:
    """Stay on one core (the last that is allowed); returns the cores before, empty where that is not possible."""
    if not hasattr(os, "sched_setaffinity"):
        return set()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    return before


def targets(found: Sequence[Measured]) -> list[Target]:
    """Judge the claims, those that the measured entries allow to."""
    ns = {(m.size, m.dtype, m.entry): m.ns for m in found}
    b, f = "bfloat16", "float32"
    wanted: list[tuple[str, tuple[str, str, str], tuple[str, str, str], float, bool]] = [
        ("tanh exact: times torch.tanh, L2", ("L2", b, "torch.tanh"), ("L2", b, "kernel tanh exact"), 30, True),
        ("tanh exact: of memcpy, L2", ("L2", b, "kernel tanh exact"), ("L2", b, "memcpy"), 2.2, False),
        ("tanh exact: of memcpy, DRAM", ("DRAM", b, "kernel tanh exact"), ("DRAM", b, "memcpy"), 1.1, False),
        ("tanh ktanh: times torch.tanh, L2", ("L2", b, "torch.tanh"), ("L2", b, "kernel tanh ktanh"), 35, True),
        ("sigmoid exact: times torch, L2", ("L2", b, "torch.sigmoid"), ("L2", b, "kernel sigmoid exact"), 2.2, True),
        ("silu exact: times torch, L2", ("L2", b, "torch.silu"), ("L2", b, "kernel silu exact"), 2.2, True),
        ("silu exact, stretch: times torch, L2", ("L2", b, "torch.silu"), ("L2", b, "kernel silu exact"), 4, True),
        (
            "gelu_tanh exact: times torch, L2",
            ("L2", b, "torch.gelu_tanh"),
            ("L2", b, "kernel gelu_tanh exact"),
            7,
            True,
        ),
        ("gelu exact: times torch, L2", ("L2", b, "torch.gelu"), ("L2", b, "kernel gelu exact"), 1.2, True),
        ("float32 tanh: times SLEEF u35, L2", ("L2", f, "peer sleef_u35"), ("L2", f, "kernel tanh exact"), 3, True),
        ("float32 tanh: times torch.tanh, L2", ("L2", f, "torch.tanh"), ("L2", f, "kernel tanh exact"), 20, True),
        *(
            (
                f"float32 {name} exact: of torch's, L2",
                ("L2", f, f"kernel {name} exact"),
                ("L2", f, f"torch.{name}"),
                1,
                False,
            )
            for name in TABLED[1:]
        ),
        *(
            (
                f"float32 {name} fast: times torch, L2",
                ("L2", f, f"torch.{name}"),
                ("L2", f, f"kernel {name} fast"),
                1.5,
                True,
            )
            for name in TABLED
        ),
        ("AVX2 tanh exact: times torch.tanh", ("L2", b, "torch.tanh"), ("L2", b, "kernel tanh exact avx2"), 3.5, True),
        ("portable tanh exact: times torch", ("L2", b, "torch.tanh"), ("L2", b, "kernel tanh exact portable"), 1, True),
        ("call on 8 elements: of torch.tanh's", ("call8", b, "act.tanh"), ("call8", b, "torch.tanh"), 5, False),
    ]
    return [
        Target(claim, ns[over] / ns[under], bound, least)
        for claim, over, under, bound, least in wanted
        if over in ns and under in ns
    ]


def environment(command: str) -> dict[str, Any]:
    """Return what goes into every row of the results: machine, its load, versions, date and command."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {"cores": os.cpu_count(), "load": load, **provenance(command)}


def rows(found: Sequence[Measured], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give one row an entry, for :func:`rarefy._files.write_csv`."""
    return [{**asdict(m), "ns": f"{m.ns:.5g}", "least_ns": f"{m.least_ns:.5g}", **about} for m in found]


def text(found: Sequence[Measured], judged: Sequence[Target]) -> str:
    """Format the entries by size and format, fastest first, and the targets, for people."""
    lines = []
    for size in dict.fromkeys(m.size for m in found):
        for dtype in dict.fromkeys(m.dtype for m in found if m.size == size):
            rows = [m for m in found if (m.size, m.dtype) == (size, dtype)]
            base = next((m.ns for m in rows if m.entry == "memcpy"), None)
            lines.append(f"{size} {dtype}" + (" (ns per element, times memcpy)" if base else " (ns)"))
            for m in sorted(rows, key=lambda m: m.ns):
                lines.append(f"  {m.entry:34s} {m.ns:10.4f}" + (f" {m.ns / base:8.2f}" if base else ""))
    for t in judged:
        bound = f"at {'least' if t.least else 'most'} {t.bound:g}"
        lines.append(f"{'met   ' if t.met else 'MISSED'} {t.claim}: {t.value:.2f} ({bound})")
    return "\n".join(lines)
