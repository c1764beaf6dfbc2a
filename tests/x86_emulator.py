"""Run a statically linked program for x86-64 Linux on an emulated processor with AVX-512 and AVX-VNNI.

The processor is that of Bochs, by the package bochscpu-python; of the system there is what the native test programs ask
for: memory, threads that give way to one another, reading files, writing to the terminal. Needs native/tests/bochscpu.c
loaded before it. Usage: python x86_emulator.py PROGRAM [ARGUMENT ...]; the exit status is the program's.
"""

import ctypes
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bochscpu
import bochscpu.cpu
import bochscpu.memory

MEMORY = 1 << 30  # all of it is one to one; what is never touched takes none
TABLES, SYSTEM_CALL, MAPPINGS, STACK_END = 0x1000, 0x5000, 0x1000_0000, MEMORY - 0x1000
REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{i}" for i in range(8, 16)), "rip", "rflags")
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8")  # of a system call
NO_SUCH_CALL, TRY_AGAIN, NO_MEMORY = -38, -11, -12
CLONE_SETTLS, CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID = 0x80000, 0x100000, 0x200000


class Thread:
    """Registers of a thread that does not run; vectors are nobody's across a system call."""

    def __init__(self, number: int, registers: dict[str, int], fs: int) -> None:
        self.number, self.registers, self.fs = number, registers, fs
        self.clear = 0  # where to write a zero at the end
        self.waits_at: int | None = None


class Machine:
    """Memory and threads of one program."""

    def __init__(self, arguments: list[str]) -> None:
        self.memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.status: int | None = None
        self.fault: str | None = None
        self.free, self.touched, self.started = [(MAPPINGS, STACK_END - (8 << 20))], MAPPINGS, 1
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self.page
        self.hook = bochscpu.Hook()
        self.hook.cache_cntrl = lambda session, *_: session.stop()
        self.hook.exception = self.exception
        self.put(TABLES, struct.pack("<Q", TABLES + 0x1003))
        self.put(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2003))
        self.put(TABLES + 0x2000, struct.pack("<512Q", *(i << 21 | 0x83 for i in range(512))))
        self.put(SYSTEM_CALL, b"\x0f\x09\xeb\xfe")  # wbinvd, whose hook stops; and there it stays
        entry, phdr, phnum = self.load(Path(arguments[0]).read_bytes())
        registers = dict.fromkeys(REGISTERS, 0) | {"rip": entry, "rflags": 2}
        registers["rsp"] = self.stack(arguments, entry, phdr, phnum)
        self.threads = [Thread(1, registers, 0)]
        self.set_up()

    def put(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data

    def number(self, address: int, code: str = "<Q") -> int:
        value: int = struct.unpack_from(code, self.memory, address)[0]
        return value

    # What the processor calls must not raise.

    def page(self, address: int) -> None:
        page = address & ~0xFFF
        if page >= MEMORY:
            self.fault = f"no memory at {address:#x}"
        bochscpu.memory.page_insert(page, self.address + page % MEMORY)

    def exception(self, session: Any, _: int, vector: int, error: int) -> None:
        self.fault = f"exception {vector} (error {error}) at {session.cpu.rip:#x}"
        session.stop()

    def load(self, program: bytes) -> tuple[int, int, int]:
        entry, table = struct.unpack_from("<QQ", program, 24)
        size, count = struct.unpack_from("<HH", program, 54)
        self.break_at = 0
        for i in range(count):
            kind, _, offset, at, _, stored, whole, _ = struct.unpack_from("<IIQQQQQQ", program, table + i * size)
            if kind == 1:
                self.put(at, program[offset : offset + stored])
                self.break_at = max(self.break_at, (at + whole + 0xFFF) & ~0xFFF)
        return entry, struct.unpack_from("<Q", program, table + 16)[0] + table, count

    def stack(self, arguments: list[str], entry: int, phdr: int, phnum: int) -> int:
        at = STACK_END
        places = []
        for argument in (*arguments, "MALLOC_ARENA_MAX=1"):  # or every thread sets some of the memory apart
            text = argument.encode() + b"\0"
            at -= len(text)
            self.put(at, text)
            places.append(at)
        at = (at & ~15) - 16  # sixteen bytes for the program's own random numbers
        about = {3: phdr, 4: 56, 5: phnum, 6: 4096, 9: entry, 25: at, 17: 100, 23: 0, 11: 0, 12: 0, 13: 0, 14: 0}
        words = [len(arguments), *places[:-1], 0, places[-1], 0]
        for key, value in about.items():
            words += [key, value]
        words += [0, 0]
        at = (at - 8 * len(words)) & ~15
        self.put(at, struct.pack(f"<{len(words)}Q", *words))
        return at

    def set_up(self) -> None:
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr0 = (state.cr0 | 2) & ~(1 << 18)  # MP; no AM
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # OSFXSR, OSXMMEXCPT, OSXSAVE
        state.cr3, state.xcr0 = TABLES, 0xE7
        state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
        state.star, state.lstar, state.sfmask = 8 << 32, SYSTEM_CALL, 0
        data = (0xC093, 16)
        segments = {"cs": (0xA09B, 8), "ds": data, "es": data, "fs": data, "gs": data, "ss": data}
        for name, (attributes, selector) in segments.items():
            segment = bochscpu.Segment()
            segment.present, segment.selector, segment.base = True, selector, 0
            segment.limit, segment.attr = 0xFFFFFFFF, attributes
            setattr(state, name, segment)
        self.session.cpu.set_state(state)

    def resume(self, thread: Thread) -> None:
        state = self.session.cpu.state
        for name, value in thread.registers.items():
            setattr(state, name, value)
        fs = state.fs
        fs.base = thread.fs
        state.fs = fs
        self.session.cpu.set_state(state)

    def run(self) -> int:
        while self.status is None:
            thread = self.threads[0]
            self.resume(thread)
            self.session.run([self.hook])
            if self.fault:
                raise RuntimeError(self.fault)
            state = self.session.cpu.state
            thread.registers = {name: getattr(state, name) for name in REGISTERS}
            thread.registers |= {"rip": state.rcx, "rflags": state.r11}
            self.system_call(thread)
            for _ in self.threads:
                if self.threads[0].waits_at is None:
                    break
                self.threads.append(self.threads.pop(0))
            else:
                raise RuntimeError("every thread waits for another")
        return self.status

    def system_call(self, thread: Thread) -> None:
        r = thread.registers
        call = CALLS.get(r["rax"])
        result = NO_SUCH_CALL if call is None else call(self, thread, *(r[name] for name in ARGUMENTS))
        r["rax"] = result % (1 << 64)

    def give_way(self) -> None:
        self.threads.append(self.threads.pop(0))

    def wake(self, address: int, count: int) -> int:
        woken = [t for t in self.threads if t.waits_at == address][:count]
        for thread in woken:
            thread.waits_at = None
        return len(woken)

    # The system calls: each gives what the program finds in rax.

    def write(self, _: Thread, file: int, at: int, size: int, *__: int) -> int:
        (sys.stderr if file == 2 else sys.stdout).write(self.memory[at : at + size].decode(errors="replace"))
        sys.stdout.flush()
        return size

    def writev(self, thread: Thread, file: int, at: int, count: int, *_: int) -> int:
        parts = [struct.unpack_from("<QQ", self.memory, at + 16 * i) for i in range(count)]
        return sum(self.write(thread, file, *part) for part in parts)

    def read(self, _: Thread, file: int, at: int, size: int, *__: int) -> int:
        data = os.read(file, size)
        self.put(at, data)
        return len(data)

    def openat(self, _: Thread, __: int, name: int, *___: int) -> int:
        path = self.memory[name : self.memory.find(b"\0", name)].decode()
        return os.open(path, os.O_RDONLY) if Path(path).is_file() else -2

    def lseek(self, _: Thread, file: int, offset: int, whence: int, *__: int) -> int:
        return os.lseek(file, offset - (1 << 64 if offset >> 63 else 0), whence)

    def brk(self, _: Thread, at: int, *__: int) -> int:
        if self.break_at <= at < MAPPINGS:
            self.break_at = at
        return self.break_at

    def mmap(self, _: Thread, __: int, size: int, *___: int) -> int:
        size = (size + 0xFFF) & ~0xFFF
        for i, (begin, end) in enumerate(self.free):
            if begin + size <= end:
                self.free[i] = (begin + size, end)
                if begin < self.touched:
                    self.put(begin, bytes(size))
                self.touched = max(self.touched, begin + size)
                return begin
        return NO_MEMORY

    def munmap(self, _: Thread, at: int, size: int, *__: int) -> int:
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.free, (at, at + ((size + 0xFFF) & ~0xFFF))]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self.free = merged
        return 0

    def sched_yield(self, *_: Any) -> int:
        self.give_way()
        return 0

    def futex(self, thread: Thread, at: int, operation: int, value: int, *_: int) -> int:
        if operation & 0x7F in (0, 9):  # to wait, as long as the number is that
            if self.number(at, "<I") != value & 0xFFFFFFFF:
                return TRY_AGAIN
            thread.waits_at = at
            self.give_way()
            return 0
        return self.wake(at, value) if operation & 0x7F in (1, 10) else NO_SUCH_CALL

    def clone(self, parent: Thread, flags: int, stack: int, parent_number: int, child_number: int, fs: int) -> int:
        self.started += 1
        child = Thread(self.started, parent.registers | {"rsp": stack, "rax": 0}, fs if flags & CLONE_SETTLS else 0)
        if flags & CLONE_PARENT_SETTID:
            self.put(parent_number, struct.pack("<I", child.number))
        if flags & CLONE_CHILD_CLEARTID:
            child.clear = child_number
        self.threads.append(child)
        return child.number

    def arch_prctl(self, thread: Thread, what: int, value: int, *_: int) -> int:
        if what != 0x1002:  # the base of fs
            return -22
        thread.fs = value
        return 0

    def clock_gettime(self, _: Thread, clock: int, at: int, *__: int) -> int:
        self.put(at, struct.pack("<QQ", *divmod(time.monotonic_ns(), 10**9)))
        return 0

    def set_tid_address(self, thread: Thread, at: int, *_: int) -> int:
        thread.clear = at
        return thread.number

    def getrandom(self, _: Thread, at: int, size: int, *__: int) -> int:
        self.put(at, bytes(size))
        return size

    def exit(self, thread: Thread, status: int, *_: int) -> int:
        if len(self.threads) == 1:
            self.status = status & 0xFF
            return 0
        self.threads.remove(thread)
        if thread.clear:
            self.put(thread.clear, bytes(4))
            self.wake(thread.clear, 1 << 30)
        return 0

    def exit_group(self, _: Thread, status: int, *__: int) -> int:
        self.status = status & 0xFF
        return 0

    def nothing(self, *_: Any) -> int:
        return 0


CALLS: dict[int, Callable[..., int]] = {
    0: Machine.read,
    1: Machine.write,
    8: Machine.lseek,
    9: Machine.mmap,
    11: Machine.munmap,
    12: Machine.brk,
    20: Machine.writev,
    24: Machine.sched_yield,
    56: Machine.clone,
    60: Machine.exit,
    158: Machine.arch_prctl,
    202: Machine.futex,
    218: Machine.set_tid_address,
    228: Machine.clock_gettime,
    231: Machine.exit_group,
    257: Machine.openat,
    318: Machine.getrandom,
    # close, mprotect, rt_sigaction, rt_sigprocmask, madvise, set_robust_list
    **dict.fromkeys((3, 10, 13, 14, 28, 273), Machine.nothing),
}

if __name__ == "__main__":
    try:
        status = Machine(sys.argv[1:]).run()
    except RuntimeError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        status = 1
    os._exit(status)  # the package does not end well by itself
