# SPDX-License-Identifier: GPL-2.0-or-later
"""`Vmm`: a VM on a board, from images to its end, on any `Kernel`.

One thread a vCPU blocks in KVM_RUN, as on a real kernel. The thread that calls
`Vmm.run` waits for the end, for the time limit or for Ctrl-C, and then brings
every vCPU home with a kick. The VM lives until `close`: what its end left can
be looked at.

Protected, the VM starts in the firmware that the host puts into the firmware
slot; in a dialect where firmware is optional or not there, in the image, unless
firmware is asked for. Unprotected, the VMM loads the firmware itself and sets the registers as
the RFC's contract would, so that the same images run.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pkvm.guests import protocol
from pkvm.kvm import (
    Exit,
    FailEntry,
    InternalError,
    Intr,
    Kvm,
    Memory,
    Mmio,
    SystemEvent,
    Unknown,
    Vcpu,
    Vm,
)
from pkvm.uapi.dialects import Creation, Firmware
from pkvm.uapi.dialects import Memory as MemoryRule
from pkvm.uapi.kvm import TYPE_PROTECTED
from pkvm.vmm import board
from pkvm.vmm.board import Board
from pkvm.vmm.devicetree import build_device_tree
from pkvm.vmm.errors import LoadError
from pkvm.vmm.irq import Line, NoLine
from pkvm.vmm.loader import Image, Segment
from pkvm.vmm.mailbox import Event, Mailbox
from pkvm.vmm.pl011 import Pl011
from pkvm.vmm.sharing import Sharing

if TYPE_CHECKING:
    from pkvm.vmm.gic import Gic

PAGE_SHIFT = 12
PAGE_MASK = (1 << PAGE_SHIFT) - 1
KICK_AGAIN_S = 0.1
"""A vCPU that has not come home after this long is kicked once more."""


class Moment(Enum):
    """When the VM can be looked at while it lives: no vCPU but the announcing one has an exit
    under way."""

    SHARED = "shared"
    """The guest announced shared memory, and the VMM has not answered in it yet."""
    UNSHARED = "unshared"
    """The guest announced that it took shared memory back."""
    END = "end"
    """The run is over; every vCPU is out of the guest, and the VM is not closed yet."""


class Outcome(NamedTuple):
    """How a run ended."""

    kind: str
    """"powered-off", "reset", "crashed", "suspended", "fail-entry", "internal-error",
    "unknown-exit", "kernel-error", "timeout", "interrupted" or "stopped"."""
    detail: str
    """The same in words."""


class Device(Protocol):
    """What answers at a page of the board. Offsets are within the page, sizes 1, 2, 4 or 8."""

    def read(self, offset: int, size: int) -> int:
        """A load of `size` bytes."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of the low `size` bytes of `value`."""
        ...


INTERRUPTED = Outcome("interrupted", "interrupted from the keyboard")
STOPPED = Outcome("stopped", "the VMM stopped the guest")
_SYSTEM_EVENTS = {
    "shutdown": Outcome("powered-off", "the guest powered off (PSCI SYSTEM_OFF)"),
    "reset": Outcome("reset", "the guest asked for a reset (PSCI SYSTEM_RESET)"),
    "crash": Outcome("crashed", "the guest crashed"),
    "suspend": Outcome("suspended", "the guest suspended itself (PSCI SYSTEM_SUSPEND)"),
}


class Vmm:
    """A VM with its devices.

    `console` gets what the guest writes to its UART, byte by byte; `source` is asked for input, as
    `Pl011` says. `plug` is called once the VM has its memory and its interrupt controller, to add
    to `devices`. `observe` is called at each `Moment`, in the thread in which it happens.
    `firmware` is for an unprotected VM, which starts in `image` directly without it; a protected
    VM's firmware is the host's, and where it is optional anything but None asks for it.
    `wall_clock` is the time since the Epoch in nanoseconds where it is not this process's. Raises
    LoadError for what does not fit, OSError for what the kernel refuses.
    """

    def __init__(
        self,
        kvm: Kvm,
        the_board: Board,
        image: Image,
        *,
        initrd: Segment | None = None,
        protected: bool = True,
        firmware: bytes | None = None,
        console: Callable[[bytes], object],
        source: Callable[[int], bytes] | None = None,
        plug: Callable[[Vmm], object] | None = None,
        observe: Callable[[Moment], object] | None = None,
        wall_clock: Callable[[], int] | None = None,
    ) -> None:
        self.kvm = kvm
        self.board = the_board
        self.image = image
        self.initrd = initrd
        self.protected = protected
        self.dialect = kvm.dialect()
        """What protected KVM the host speaks."""
        self._observe = observe
        self._stack = ExitStack()
        self._device_lock = threading.Lock()
        self._end_lock = threading.Lock()
        self._ended = threading.Event()
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        self._end_calls: list[Callable[[], object]] = []
        self.ran = False
        """Whether a vCPU is known to have run guest code: it left the guest for a reason of its
        own."""
        self.stray_accesses = 0
        """MMIO accesses to addresses without a device: they read as zero."""
        self.mailbox = Mailbox(self._on_event)
        self.devices: dict[int, Device] = {board.MAILBOX_BASE >> PAGE_SHIFT: self.mailbox}
        """The board's devices by page number of their IPA."""
        with self._stack:
            self._build_memory(firmware)
            self.gic = self._make_gic()
            line = self.line(board.UART_SPI) if self.gic else None
            self.uart = Pl011(console, source, line, hold_input=image.page_bytes != 0)
            self.devices[board.UART_BASE >> PAGE_SHIFT] = self.uart
            if self.gic is not None:
                self._add_clock(wall_clock)
            if plug is not None:
                plug(self)
            self._build_vcpus()
            self._stack = self._stack.pop_all()

    @property
    def gets_memory_by_touch(self) -> bool:
        """Whether a protected guest's memory is the host's until the guest touches it."""
        return self.dialect.memory is not MemoryRule.AT_ENABLE

    def line(self, spi: int) -> Line:
        """The interrupt line of an SPI; where the board has no interrupt controller, one that ends
        nowhere."""
        return NoLine() if self.gic is None else self.gic.line(spi)

    def at_close(self, call: Callable[[], object]) -> None:
        """Let `call` be called when the VM is closed, before its memory goes. The last comes
        first."""
        self._stack.callback(call)

    def at_end(self, call: Callable[[], object]) -> None:
        """Let `call` be called when the run ends, before its vCPUs are waited for: what keeps one
        of their threads is to let go of it."""
        self._end_calls.append(call)

    def _build_memory(self, firmware: bytes | None) -> None:
        enter = self._stack.enter_context
        self.vm = enter(self._create_vm())
        self.ram = self._map(self.board.ram_bytes)
        self.device_tree = build_device_tree(self.board, self.image, self.initrd)
        self.ram.write(0, self.device_tree)
        initrd = () if self.initrd is None else (self.initrd,)
        for segment in (*self.image.segments, *initrd):
            self.ram.write(segment.ipa - board.RAM_BASE, segment.data)
        self.vm.set_user_memory_region(board.RAM_SLOT, board.RAM_BASE, self.ram)

        self.firmware_bytes = self._firmware_bytes(firmware)
        """Bytes of the firmware that the VM starts in; 0: none."""
        self.firmware_memory: Memory | None = None
        if self.firmware_bytes:
            self.firmware_memory = self._map(board.FIRMWARE_BYTES)
            if firmware is not None and not self.protected:
                self.firmware_memory.write(0, firmware)
            self.vm.set_user_memory_region(
                board.FIRMWARE_SLOT, board.FIRMWARE_BASE, self.firmware_memory
            )
        self.sharing = Sharing(self.ram, board.RAM_BASE)

        if self.dialect.firmware is Firmware.SLOT and self.protected:
            self.vm.protect(board.FIRMWARE_SLOT)
        elif self.firmware_bytes and self.protected:
            self.vm.set_firmware_address(board.FIRMWARE_BASE)

    def _create_vm(self) -> Vm:
        """The VM; protected already, where the dialect has it so."""
        by_type = self.dialect.creation is Creation.TYPE_BIT
        try:
            if self.protected and by_type:
                return self.kvm.create_vm(TYPE_PROTECTED)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise LoadError(
                "this host offers no protected VMs (KVM_CAP_ARM_PROTECTED_VM is 0, and "
                "KVM_CREATE_VM has no bit 31): boot it in protected mode "
                "(kvm-arm.mode=protected), or run with --unprotected"
            ) from error
        return self.kvm.create_vm()

    def _make_gic(self) -> Gic | None:
        if not self.board.gic:
            return None
        # Imported here, as the clock below: a bare program has neither.
        from pkvm.vmm.gic import Gic

        gic = Gic(self.vm)
        self.at_close(gic.close)
        return gic

    def _add_clock(self, wall_clock: Callable[[], int] | None) -> None:
        from pkvm.vmm.pl031 import Pl031

        line = self.line(board.RTC_SPI)
        clock = Pl031(line) if wall_clock is None else Pl031(line, wall_clock, None)
        self.at_close(clock.close)
        self.devices[board.RTC_BASE >> PAGE_SHIFT] = clock

    def _build_vcpus(self) -> None:
        self.vcpus: list[Vcpu] = []
        for index in range(self.board.cpus):
            vcpu = self._stack.enter_context(self.vm.create_vcpu(index))
            vcpu.init(power_off=index > 0)
            self.vcpus.append(vcpu)
        if self.gic is not None:
            self.gic.start()
        self._set_entry_state(self.vcpus[0])

    def _map(self, length: int) -> Memory:
        memory = self.kvm.mmap(length)
        self._stack.callback(memory.close)
        return memory

    def _firmware_bytes(self, firmware: bytes | None) -> int:
        wanted = firmware is not None or self.dialect.firmware is Firmware.SLOT
        if self.protected and wanted and self.dialect.capability is not None:
            size = self.vm.protected_vm_info(cap=self.dialect.capability).firmware_size
            if not size:
                raise LoadError(
                    "this host has no guest firmware, and a protected VM starts in it: "
                    "give one with --firmware, or run with --unprotected"
                )
        else:
            size = len(firmware) if firmware is not None and not self.protected else 0
        if size > board.FIRMWARE_BYTES:
            raise LoadError(
                f"the firmware has {size} bytes, and its slot {board.FIRMWARE_BYTES}: use a "
                "smaller one"
            )
        return size

    def _set_entry_state(self, vcpu: Vcpu) -> None:
        vcpu.set_reg("x0", board.DTB_BASE)
        if self.protected and self.firmware_bytes:
            return
        if self.firmware_bytes:
            vcpu.set_reg("pc", board.FIRMWARE_BASE)
            vcpu.set_reg("sp_el1", board.FIRMWARE_BASE + board.FIRMWARE_BYTES)
        else:
            vcpu.set_reg("pc", self.image.entry)

    def run(self, timeout: float | None = None) -> Outcome:
        """Run until the guest ends, `stop` is called, `timeout` seconds have passed or Ctrl-C is
        pressed. Raises what a device, a sink or `observe` raised. Once only."""
        threads = [
            threading.Thread(target=self._run_vcpu, args=(vcpu,), name=f"vcpu{vcpu.id}")
            for vcpu in self.vcpus
        ]
        try:
            for thread in threads:
                thread.start()
            if not self._ended.wait(timeout):
                self._end(Outcome("timeout", f"the guest still ran after {timeout:g} seconds"))
        except KeyboardInterrupt:
            self._end(INTERRUPTED)
        finally:
            self._bring_home(threads)
        if self._failure is not None:
            raise self._failure
        if self._outcome is None:
            raise RuntimeError("the run ended without saying how")
        self._look(Moment.END)
        return self._outcome

    def stop(self, outcome: Outcome = STOPPED) -> None:
        """End the run from another thread, with this outcome."""
        self._end(outcome)

    def close(self) -> None:
        """Close vCPUs and VM and give the memory back. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Vmm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, outcome: Outcome) -> None:
        with self._end_lock:
            if self._outcome is None:
                self._outcome = outcome
        self._ended.set()

    def _bring_home(self, threads: list[threading.Thread]) -> None:
        self._ended.set()
        for call in self._end_calls:
            call()
        started = [
            (vcpu, thread)
            for vcpu, thread in zip(self.vcpus, threads, strict=True)
            if thread.ident is not None
        ]
        # All of them first: a device may be busy for one as long as another gives it work.
        for vcpu, _ in started:
            vcpu.kick()
        for vcpu, thread in started:
            thread.join(KICK_AGAIN_S)
            while thread.is_alive():
                vcpu.kick()
                thread.join(KICK_AGAIN_S)

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        try:
            self._end(self._serve(vcpu))
        except BaseException as error:
            # The thread's boundary: `run` raises it again in its caller's thread.
            self._failure = self._failure or error
            self._ended.set()

    def _serve(self, vcpu: Vcpu) -> Outcome:
        run, complete = vcpu.run, vcpu.complete
        devices, take, drop = self.devices.get, self._device_lock.acquire, self._device_lock.release
        while True:
            try:
                exit_ = run()
            except OSError as error:
                return Outcome(
                    "kernel-error", f"KVM_RUN of vCPU {vcpu.id}: {error.strerror or error}"
                )
            if type(exit_) is Mmio:
                address, size, data, is_write = exit_
                self.ran = True
                device = devices(address >> PAGE_SHIFT)
                take()  # spelt out: a `with` costs half as much again
                try:
                    if device is None:
                        self.stray_accesses += 1
                        complete(exit_, 0)
                    elif is_write:
                        device.write(address & PAGE_MASK, size, data)
                    else:
                        complete(exit_, device.read(address & PAGE_MASK, size))
                finally:
                    drop()
                continue
            outcome = self._outcome_of(vcpu, exit_)
            if outcome is not None:
                return outcome

    def _outcome_of(self, vcpu: Vcpu, exit_: Exit) -> Outcome | None:
        """How the run ends with this exit; None if the vCPU is to be run again."""
        self.ran = self.ran or not isinstance(exit_, Intr)
        match exit_:
            case Intr():
                if self._ended.is_set():
                    return STOPPED
                return None
            case SystemEvent(kind=kind):
                return _SYSTEM_EVENTS.get(
                    kind, Outcome("unknown-exit", f"the guest raised system event {kind}")
                )
            case FailEntry(reason=reason):
                return Outcome(
                    "fail-entry",
                    f"vCPU {vcpu.id} cannot enter the guest (reason {reason:#x}): a protected "
                    "guest must not use AArch32",
                )
            case InternalError(suberror=suberror):
                return Outcome(
                    "internal-error", f"the kernel cannot go on with vCPU {vcpu.id} ({suberror})"
                )
            case Unknown(reason=reason):
                return Outcome(
                    "unknown-exit", f"vCPU {vcpu.id} left the guest with exit reason {reason}"
                )
        return None

    def _on_event(self, event: Event) -> None:
        if event.code == protocol.Event.SHARED:
            shared = self.sharing.announce(event.args)
            if shared is not None:
                self._look(Moment.SHARED)
                self.sharing.reply(shared)
        elif event.code == protocol.Event.UNSHARED:
            self.sharing.withdraw(event.args)
            self._look(Moment.UNSHARED)

    def _look(self, moment: Moment) -> None:
        if self._observe is not None:
            self._observe(moment)
