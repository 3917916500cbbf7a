# SPDX-License-Identifier: GPL-2.0-or-later
"""`UnicornEngine`: the CPU engine on libunicorn 2.1.4.

One engine is one physical CPU: Cortex-A72 or QEMU's "max", with EL2 and EL3,
started in non-secure EL1. All RAM is one region; libunicorn's own stage-2 walker
reads the descriptors in it. Its hooks hand exceptions for EL2 to `vector` from
inside `run`, and take those for EL1 natively (`thunks`).

What libunicorn does in its own way, and what is done about it here:

* It checks for an exit after each load and store, and then replays the
  instruction: `no_exit_request` prevents such translations. Thumb code clears
  it; where it is found clear, all translations are dropped.
* `uc_emu_start` treats PC 0 as the place to stop: exits are switched off.
* A stop that comes just before a start is forgotten: see `exclusion`. `run`
  starts again after a stop that nobody asked for.
* A pending virtual interrupt is taken while emulation stops, and would change
  PC under an exit to EL2: the lines are dropped for the time outside.
* An access where nothing answers ends emulation: a load or fetch becomes an
  external abort in the guest, a store is lost, as posted writes are.
* It describes loads and stores with writeback in syndromes: see `writeback`.
* Writes through a mapping that is not executable leave stale translations:
  IC instructions are made to do their work (`instruction_cache`).
* WFI that EL2 does not trap completes at once, as it may.
* Hardware breakpoints live outside the saved context and would follow the
  engine into another VM: their registers store, and nothing matches.
* Half-precision decoding ends the process at some unallocated encodings:
  FEAT_FP16 is taken out of "max".
* Without an EL3, SMC is undefined (SCR_EL3.SMD) unless HCR_EL2.TSC traps it.

Registers and the interrupt controller belong to the thread that runs the guest.
`interrupt`, `flush_tlb` and `invalidate_code` may be called from any thread; of
these only `interrupt` may be called from a signal handler.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

from unicorn import unicorn_const as uc

from pkvm.arm64 import bits
from pkvm.arm64 import esr as syndrome
from pkvm.arm64 import registers as reg
from pkvm.machine.cpu import cpu_models, gic_registers, selfcheck, thunks, writeback
from pkvm.machine.cpu.context import CpuContext
from pkvm.machine.cpu.device_windows import DeviceWindows
from pkvm.machine.cpu.engine import StopReason
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.exclusion import (
    FIRST_WAIT_S,
    INSIDE,
    INTERRUPTED,
    LONGEST_WAIT_S,
    WAITING,
    CpuOwnership,
)
from pkvm.machine.cpu.instruction_cache import InstructionCache
from pkvm.machine.cpu.library import (
    BLOCK_HOOK,
    INTERRUPT_HOOK,
    START,
    VECTOR_ENTRY,
    Library,
)
from pkvm.machine.cpu.sysregs import AARCH64_KEY
from pkvm.machine.cpu.thunks import ABORT
from pkvm.machine.cpu.timers import GenericTimer
from pkvm.machine.cpu.unicorn_layout import LAYOUT
from pkvm.machine.gic import VirtualCpuInterface
from pkvm.machine.memory import PhysicalMemory

_DEBUG_REGISTERS = [reg.SysReg(2, 0, 0, n, kind) for n in range(16) for kind in range(4, 8)]
_FNV = syndrome.ABORT_ISS["FnV"].mask
_ABORTS = (3, 4)
"""QEMU's numbers of the exceptions that have a faulting address: prefetch and data abort."""
_BY_VECTOR = StopReason.VECTOR
"""A member of an enumeration is slow to look up."""
_LINES = LAYOUT.interrupt_virq | LAYOUT.interrupt_vfiq
_proven: set[str] = set()
"""Libraries that passed the self-test in this process."""


class UnicornEngine(CpuContext):
    """One physical CPU that executes guest code in `memory`; implements `CpuEngine`.

    `count_blocks` makes `blocks` count and `set_slice` possible. `counter` replaces the host's
    clock as the physical counter (62.5 MHz ticks); it is called in the middle of guest code, where
    it may read `blocks` and call nothing else of the engine. Raises EngineError if libunicorn is
    not the 2.1.4 wheel, ValueError for an unknown CPU model.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        cpu_model: str = "cortex-a72",
        count_blocks: bool = False,
        counter: Callable[[], int] | None = None,
    ) -> None:
        cpu_models.require(cpu_model)
        library = Library()
        selfcheck.require_version(library, LAYOUT)
        if library.path not in _proven:
            _proven.add(library.path)
            try:
                selfcheck.prove(library, UnicornEngine)
            except BaseException:
                _proven.discard(library.path)
                raise
        self._closed = True
        handle = cpu_models.open_machine(library, cpu_model, memory)
        self._handle = handle
        self._finalizer = weakref.finalize(self, library.uc_close, handle)
        self._finalizer.atexit = False
        try:
            addresses = selfcheck.find_cpu(library, LAYOUT, handle.value or 0)
            super().__init__(library, LAYOUT, addresses, memory)
            self._set_up(count_blocks, counter)
        except BaseException:
            self._finalizer()
            raise
        self._closed = False

    def _set_up(self, count_blocks: bool, counter: Callable[[], int] | None) -> None:
        library, addresses = self._library, self._addresses
        self._counting = count_blocks
        self._counters = memoryview((ctypes.c_uint64 * thunks.COUNTER_WORDS)()).cast("B").cast("Q")
        self._counters[thunks.LIMIT] = thunks.NO_LIMIT
        no_exit = ctypes.c_uint8.from_address(addresses.uc + LAYOUT.uc_no_exit_request)
        self._no_exit: memoryview[int] = memoryview(no_exit).cast("B")
        self._no_exit[0] = 1
        requests = ctypes.c_uint32.from_address(addresses.cpu + LAYOUT.cpu_interrupt_request)
        self._requests: memoryview[int] = memoryview(requests).cast("B").cast("I")
        self._abort_pending = ctypes.c_uint32()
        """The native code's own."""
        self._lines_dropped = False
        self._stopping = threading.Lock()
        self._ownership = CpuOwnership(self._stop)
        self._flags = self._ownership.flags
        self._runner = 0
        """The thread that is in `run`, 0 for none."""
        self._reason: StopReason | None = None
        self._error: BaseException | None = None
        cpu_models.hide_half_precision(addresses.env + LAYOUT.isar_id_aa64pfr0)
        cpu_models.shrink_unused_tlbs(addresses.env, LAYOUT)
        self.gic = VirtualCpuInterface(self._set_lines, self._interrupt_self)
        self._gic_registers = gic_registers.define(
            library, LAYOUT, addresses.cpu, self.gic.guest_registers()
        )
        gic_registers.show_in_pfr0(addresses.env + LAYOUT.isar_id_aa64pfr0)
        self._slice_limit = self._alarm_limit = thunks.NO_LIMIT
        self.on_alarm: Callable[[], None] = _no_alarm
        self._settle, self._forget_code = writeback.corrector(
            library, addresses, self._memory, self._words, self._esr_el2_word
        )
        self._windows = DeviceWindows(
            library, addresses.uc, self._memory, self._ownership, self._fail
        )
        self._due = self._windows.due
        self._install_hooks()
        self.vector = _no_vector
        cpu_models.program_reset_state(self._sysregs)
        self._make_pristine()
        self._counter = counter
        read_counter = None if counter is None else self._read_counter
        self._timer = GenericTimer(self._sysregs, LAYOUT, self._words, read_counter)
        for register in _DEBUG_REGISTERS:
            self._sysregs.store_writes(AARCH64_KEY | register.one_reg)
        ram = library.qemu_ram_addr_from_host(addresses.uc, self._memory.host_address)
        self._ram_address_shift = ram - self._memory.ram_base
        self._instruction_cache = InstructionCache(
            library, addresses, self._sysregs, self._memory, self._ram_address_shift
        )

    def _install_hooks(self) -> None:
        library, addresses = self._library, self._addresses
        self._on_vector, self._set_vector = self._make_vector_entry()
        self._vector_callback = VECTOR_ENTRY(self._on_vector)
        self._slow_callback = INTERRUPT_HOOK(self._on_exception)
        self._block_callback = BLOCK_HOOK(self._on_block)
        self._exception_address = _address(self._slow_callback)
        block_address = _address(self._block_callback)
        env = addresses.env
        pool = {
            "UC": addresses.uc,
            "CPU": addresses.cpu,
            "PC": env + 8 * self._pc_word,
            "DO_INTERRUPT": library.address_of("arm_cpu_do_interrupt"),
            "EMU_START": library.address_of("uc_emu_start"),
            "EMU_STOP": library.address_of("uc_emu_stop"),
            "VECTOR": _address(self._vector_callback),
            "SLOW": self._exception_address,
            "COUNTERS": ctypes.addressof(ctypes.c_uint64.from_buffer(self._counters)),
            "REQUESTS": addresses.cpu + LAYOUT.cpu_interrupt_request,
            "PENDING": ctypes.addressof(self._abort_pending),
            "NO_EXIT": addresses.uc + LAYOUT.uc_no_exit_request,
            "TARGET_EL": env + LAYOUT.target_el,
            "AARCH64": env + LAYOUT.aarch64,
            "SYNDROME": env + LAYOUT.syndrome,
            "ESR_EL2": env + 8 * self._esr_el2_word,
            "VADDRESS": env + LAYOUT.vaddress,
            "FAR_EL2": env + 8 * self._far_el2_word,
        }
        self._start: Callable[[], int] = self._start_by_library
        self._native = thunks.build(pool)
        if self._native is not None:
            self._exception_address, block_address = self._native.exception, self._native.block
            self._start = START(self._native.start)
        self._exception_hook = self._add_hook(uc.UC_HOOK_INTR, self._exception_address)
        if self._counting:
            self._add_hook(uc.UC_HOOK_BLOCK, block_address)

    def _add_hook(self, kind: int, address: int) -> int:
        handle = ctypes.c_size_t()
        status = self._library.uc_hook_add(
            self._handle, ctypes.byref(handle), kind, address, None, 1, 0
        )
        self._library.check(status, "add a hook")
        return handle.value

    def run_bare(self, hook: int) -> None:
        """For measurements: run the guest with the C function at address `hook`, an INTERRUPT_HOOK,
        in place of all that the engine does for an exception, until it calls `uc_emu_stop`."""
        self._library.uc_hook_del(self._handle, self._exception_hook)
        handle = self._add_hook(uc.UC_HOOK_INTR, hook)
        try:
            self._library.uc_emu_start(self._handle, self.pc, 0, 0, 0)
        finally:
            self._library.uc_hook_del(self._handle, handle)
            self._exception_hook = self._add_hook(uc.UC_HOOK_INTR, self._exception_address)

    # Hooks, called by libunicorn while the guest owns the CPU

    def _make_vector_entry(self) -> tuple[Callable[[], bool], Callable[[Callable[[], bool]], None]]:
        """The function that the hook calls for an exception taken from AArch64 state to EL2, with
        ESR_EL2 and FAR_EL2 set, which returns whether to stop emulation; and the one that gives it
        EL2's vector. Every hypercall of a guest passes here, so all that it needs is local to
        it."""
        flags, requests = self._ownership.flags, self._requests
        words, esr_el2, settle = self._words, self._esr_el2_word, self._settle
        data_abort = syndrome.EC.DABT_LOW << syndrome.EC_SHIFT  # few classes are above it
        vector: Callable[[], bool] = _no_vector

        def enter() -> bool:
            flags[INSIDE] = False
            if words[esr_el2] >= data_abort:
                settle()
            try:
                again = vector()
            except BaseException as error:  # whatever EL2 raises belongs to who called run
                self._error = error
                again = False
            flags[INSIDE] = True
            if flags[WAITING]:
                self._ownership.give_way()
            if again:
                return flags[INTERRUPTED]
            self._reason = _BY_VECTOR
            if requests[0] & _LINES:
                self._drop_lines()
            return True

        def set_vector(new: Callable[[], bool]) -> None:
            nonlocal vector
            vector = new

        return enter, set_vector

    @property
    def vector(self) -> Callable[[], bool]:
        """EL2's exception vector."""
        return self._vector

    @vector.setter
    def vector(self, vector: Callable[[], bool]) -> None:
        self._vector = vector
        self._set_vector(vector)

    def _on_exception(self, _uc: int, number: int, _data: int) -> None:
        """Any exception: the whole of what the native hook does, and the rest."""
        if self._no_exit[0] != 1:
            self._drop_translations()
        target = self._halves[LAYOUT.target_el >> 2]
        if number > thunks.LAST_ARCHITECTURAL or target not in (1, 2):
            self._error = EngineError(
                f"libunicorn raised exception {number} to EL{target} at PC {self.pc:#x}"
            )
            self._library.uc_emu_stop(self._handle)
            return
        if target == 1:
            self._library.arm_cpu_do_interrupt(self._addresses.cpu)
            self._charge_delivery()
            return
        self._words[self._esr_el2_word] = self._halves[LAYOUT.syndrome >> 2]
        if number in _ABORTS:
            self._words[self._far_el2_word] = self._words[LAYOUT.vaddress >> 3]
        aarch32 = not self._halves[self._aarch64_half]
        if aarch32:
            self._leave_aarch32()
        if self._on_vector():
            self._library.uc_emu_stop(self._handle)
        if aarch32 and not self._halves[self._aarch64_half]:
            self._enter_aarch32()

    def _on_block(self, _uc: int, _address: int, _size: int, _data: int) -> None:
        counters = self._counters
        if counters[thunks.COUNT] >= counters[thunks.LIMIT]:
            counters[thunks.LIMIT_REACHED] = 1
            self._library.uc_emu_stop(self._handle)
            return
        counters[thunks.COUNT] += 1

    def _fail(self, error: BaseException) -> None:
        """Have `run` raise what happened inside guest code."""
        self._error = error
        self._library.uc_emu_stop(self._handle)

    def _charge_delivery(self) -> None:
        """An exception was taken to EL1: it counts as a block if none ran since the one before."""
        counters = self._counters
        if counters[thunks.COUNT] == counters[thunks.LAST_DELIVERY]:
            if counters[thunks.COUNT] >= counters[thunks.LIMIT]:
                counters[thunks.LIMIT_REACHED] = 1
                self._library.uc_emu_stop(self._handle)
                return
            counters[thunks.COUNT] += 1
        counters[thunks.LAST_DELIVERY] = counters[thunks.COUNT]

    def _read_counter(self) -> int:
        """The physical counter, from `counter`; called from inside guest code."""
        assert self._counter is not None
        try:
            return self._counter() & bits.MASK64
        except BaseException as error:
            self._fail(error)
            return 0

    # Running

    def run(self) -> StopReason:
        """Run the guest until EL2 gets the CPU back; what `vector` or `counter` raised is raised
        again here. Raises EngineError if a run is under way or the engine is closed."""
        if self._runner:
            raise EngineError("the engine is running already; its vector must not run it again")
        self._runner = get_ident()
        flags, halves, aarch64 = self._flags, self._halves, self._aarch64_half
        settle = self._settle
        try:
            flags[INSIDE] = True
            while True:
                if self._due:
                    flags[INSIDE] = False
                    self._windows.work()
                    flags[INSIDE] = True
                if flags[WAITING]:
                    self._ownership.give_way()
                if self._closed:
                    raise EngineError("the engine is closed")
                if flags[INTERRUPTED]:
                    flags[INTERRUPTED] = False
                    return StopReason.INTERRUPT
                if self._no_exit[0] != 1:
                    self._drop_translations()
                if self._lines_dropped:
                    self._lines_dropped = False
                    self._update_lines()
                if not halves[aarch64]:
                    self._enter_aarch32()
                # Each exit to the host comes by here: no call more than it needs.
                status = self._start()
                if status == ABORT:
                    flags[INSIDE] = False
                    settle()
                    if self._vector():
                        flags[INSIDE] = True
                        continue
                    if flags[WAITING]:
                        self._ownership.give_way()
                    return _BY_VECTOR
                if not halves[aarch64]:
                    self._leave_aarch32()
                if self._reason is None or self._error is not None:
                    self._reason = self._why_stopped(status)
                if self._reason is not None:
                    return self._reason
        finally:
            flags[INSIDE] = False
            self._reason = None
            self._runner = 0
            if self._due:
                self._windows.work()
            if self._closed:
                self._free()

    def _why_stopped(self, status: int) -> StopReason | None:
        """What else than the vector ended emulation; None for no reason that EL2 knows."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if status:
            self._external_abort(status)
        if self._counters[thunks.LIMIT_REACHED]:
            self._counters[thunks.LIMIT_REACHED] = 0
            return self._limit_reached()
        return None

    def _limit_reached(self) -> StopReason | None:
        """Enough blocks were executed for an alarm, which is called here, or for the slice."""
        count = self._counters[thunks.COUNT]
        if count >= self._alarm_limit:
            self._flags[INSIDE] = False
            self.set_alarm(None)
            self.on_alarm()
            self._flags[INSIDE] = True
        elif count >= self._slice_limit:
            self.set_slice(None)
            return StopReason.SLICE
        return None

    def _start_by_library(self) -> int:
        """Without native code."""
        return int(self._library.uc_emu_start(self._handle, self.pc, 0, 0, 0))

    def _external_abort(self, status: int) -> None:
        """The guest reached for a PA where nothing answers."""
        if status == uc.UC_ERR_WRITE_UNMAPPED:
            return
        from_el0 = self.pstate & reg.PSTATE_MODE_MASK in (reg.PSTATE_EL0T, reg.PSTATE_NRW)
        if status == uc.UC_ERR_FETCH_UNMAPPED:
            exception = syndrome.EC.IABT_LOW if from_el0 else syndrome.EC.IABT_CUR
            iss, far = syndrome.FSC_EXTERNAL, self.pc
        elif status == uc.UC_ERR_READ_UNMAPPED:
            exception = syndrome.EC.DABT_LOW if from_el0 else syndrome.EC.DABT_CUR
            iss, far = syndrome.FSC_EXTERNAL | _FNV, 0
        else:
            self._library.check(status, f"go on at PC {self.pc:#x}")
            return
        self.take_exception_to_el1(exception << syndrome.EC_SHIFT | syndrome.IL | iss, far)
        self._charge_delivery()

    def _drop_translations(self) -> None:
        """Drop all translations, since some check for an exit after loads and stores."""
        self._no_exit[0] = 1
        self._library.tb_flush(self._addresses.cpu)

    def _drop_lines(self) -> None:
        """Keep pending virtual interrupts from being taken while emulation stops."""
        self._requests[0] &= ~_LINES
        self._lines_dropped = True

    def load_context(self, pa: int) -> None:
        """`CpuContext.load_context`; the virtual timer is that context's from now on."""
        super().load_context(pa)
        self._timer.context_changed()

    def reset_context(self) -> None:
        """`CpuContext.reset_context`; the virtual timer is off."""
        super().reset_context()
        self._timer.context_changed()

    @property
    def on_deadline(self) -> Callable[[int | None], None]:
        """Told at which physical count the running context's virtual timer will be due, or None,
        whenever that changes; see `GenericTimer`."""
        return self._timer.on_deadline

    @on_deadline.setter
    def on_deadline(self, function: Callable[[int | None], None]) -> None:
        self._timer.on_deadline = function

    # From any thread

    def interrupt(self) -> None:
        """A physical interrupt to EL2: `run` returns `StopReason.INTERRUPT`, at its next call if
        none is under way. The guest has left the CPU when this returns, or is about to take the
        interrupt; it does not wait for the caller, as it does for who needs the CPU itself."""
        self._flags[INTERRUPTED] = True
        if not self._flags[INSIDE]:
            return
        if self._runner == threading.get_ident():
            # A signal handler broke into `run`, and cannot wait for the code that it broke into.
            threading.Thread(target=self._push_out, daemon=True).start()
            return
        self._push_out()

    def _push_out(self) -> None:
        """Ask for a stop until the guest is out: one just before emulation starts is forgotten."""
        flags, wait = self._flags, FIRST_WAIT_S
        while flags[INSIDE] and flags[INTERRUPTED]:
            self._stop()
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _interrupt_self(self) -> None:
        """A physical interrupt that the guest's own instruction causes."""
        self._flags[INTERRUPTED] = True
        if self._flags[INSIDE]:
            self._library.uc_emu_stop(self._handle)

    def _set_lines(self, irq: bool, fiq: bool) -> None:
        """Drive the virtual lines, from the thread that runs the guest."""
        half = LAYOUT.irq_line_state >> 2
        lines = (LAYOUT.interrupt_virq if irq else 0) | (LAYOUT.interrupt_vfiq if fiq else 0)
        if self._halves[half] != lines and not self._closed:
            self._halves[half] = lines
            self._update_lines()

    def _stop(self) -> None:
        """Ask libunicorn to leave guest code; from any thread."""
        with self._stopping:
            if self._finalizer.alive:
                self._library.uc_emu_stop(self._handle)

    def flush_tlb(self) -> None:
        """TLBI of everything below EL2, complete when it returns."""
        with self._ownership:
            self._forget_code()
            if not self._closed:
                self._library.tlb_flush(self._addresses.cpu)

    def invalidate_code(self, pa: int, length: int) -> None:
        """Forget translations of guest code in [pa, pa+length), bytes. Outside RAM there are
        none, and the call does nothing."""
        start = max(pa, self._memory.ram_base)
        end = min(pa + length, self._memory.ram_end)
        if start >= end:
            return
        shift = self._ram_address_shift
        with self._ownership:
            if not self._closed:
                self._library.tb_invalidate_phys_range(
                    self._addresses.uc, start + shift, end + shift
                )

    # Virtual time

    @property
    def blocks(self) -> int:
        """Translated blocks executed so far; 0 for ever if counting is off."""
        return self._counters[thunks.COUNT] if self._counting else 0

    def set_slice(self, blocks: int | None) -> None:
        """End the run after so many translated blocks from now, exactly and repeatably; None:
        never. A slice outlasts runs that end otherwise, and is gone when it has ended one. Raises
        ValueError if the engine was made without block counting, or for a negative number."""
        self._slice_limit = self._limit(blocks)
        self._counters[thunks.LIMIT] = min(self._slice_limit, self._alarm_limit)

    def set_alarm(self, blocks: int | None) -> None:
        """Call `on_alarm` after so many translated blocks from now, exactly and repeatably, between
        two blocks of guest code; None: never. Raises ValueError as `set_slice`."""
        self._alarm_limit = self._limit(blocks)
        self._counters[thunks.LIMIT] = min(self._slice_limit, self._alarm_limit)

    def _limit(self, blocks: int | None) -> int:
        """The block count at which so many more have been executed."""
        if blocks is None:
            return thunks.NO_LIMIT
        if not self._counting:
            raise ValueError("this engine does not count blocks")
        if blocks < 0:
            raise ValueError(f"a slice has {blocks} blocks")
        return min(self._counters[thunks.COUNT] + blocks, thunks.NO_LIMIT)

    def close(self) -> None:
        """Free the engine, or let a run that is under way end with EngineError and free it then.
        Idempotent. Registers keep their last values; a view of `x` kept from before does not."""
        self._closed = True
        self.interrupt()
        self._free()

    def _free(self) -> None:
        """Free the engine unless a run is under way, which will call this at its end."""
        if self._runner:
            return
        with self._ownership, self._stopping:
            if self._finalizer.alive:
                self._detach()
                self._finalizer()


def _address(callback: Any) -> int:
    return ctypes.cast(callback, ctypes.c_void_p).value or 0


def _no_alarm() -> None:
    """Nobody wants to know."""


def _no_vector() -> bool:
    raise EngineError("an exception was taken to EL2, and `vector` was never set")
