# SPDX-License-Identifier: GPL-2.0-or-later
"""A real machine with a real EL2, and a host that does no more than its hypercalls.

The guest firmware is one instruction, `br x0`: what a test wants to run lies in
the VM's RAM, and X0 of the primary says where.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fakes import a64
from fakes.memory_rig import EventList
from pkvm.arm64.registers import PSTATE_RESET, SCTLR_EL1, SCTLR_EL1_RESET
from pkvm.check.invariants import Snapshot, check_hyp
from pkvm.check.watch import Watch
from pkvm.events import Refusal
from pkvm.hyp.abi import (
    CONTEXT_SYSREGS,
    HOST_CALL_BASE,
    VCPU_AREA_BYTES,
    VM_AREA_BYTES,
    ExitCode,
    HostCall,
    HostVcpu,
    HostVm,
    HypRequest,
    RunResult,
    VcpuFlag,
)
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import carveout_bytes
from pkvm.hyp.policy import ANDROID, RFC, Policy
from pkvm.hyp.vcpu import Vcpu
from pkvm.hyp.vm import Vm
from pkvm.machine.machine import DMA_STREAM, Machine
from pkvm.machine.smmu_streams import StreamMaster

MIB = 1 << 20
PAGE = 4096
BLOCK = 2 * MIB
FIRMWARE_BYTES = 0x2000
FIRMWARE_IPA = 0x1_0000_0000
SLOT_BYTES = 0x4000
RAM_IPA = 0x4000_0000
NOWHERE = 0x900_0000
"""An IPA at which no VM has memory."""
SCTLR = HostVcpu.SYSREGS + 8 * CONTEXT_SYSREGS.index(SCTLR_EL1)

INCREMENT_PC = VcpuFlag.INCREMENT_PC
PENDING_EXCEPTION = VcpuFlag.PENDING_EXCEPTION
DIRTY = VcpuFlag.DIRTY


E = TypeVar("E")


class El2:
    """Machine, EL2 and host: RAM from the bottom is the host's, then firmware, then EL2's."""

    def __init__(
        self,
        *,
        ram_bytes: int = 32 * MIB,
        protected: bool = True,
        firmware: bool = True,
        cpu_model: str = "cortex-a72",
        virtual_clock: bool = False,
        policy: Policy = RFC,
    ) -> None:
        self.recorder = EventList()
        self.machine = Machine(
            ram_bytes, recorder=self.recorder, cpu_model=cpu_model, virtual_clock=virtual_clock
        )
        memory = self.machine.memory
        size = carveout_bytes(ram_bytes)
        self.firmware_pa = memory.ram_end - size - FIRMWARE_BYTES
        image = a64.code([a64.br(0)])
        self.image = image + bytes(range(256)) * ((FIRMWARE_BYTES - len(image)) // 256)
        self.image = self.image.ljust(FIRMWARE_BYTES, b"\xf1")
        memory.write(self.firmware_pa, self.image)
        self.hyp = Hypervisor(
            self.machine,
            self.recorder,
            carveout=(memory.ram_end - size, size),
            firmware=(self.firmware_pa, FIRMWARE_BYTES) if firmware else None,
            protected=protected,
            policy=policy,
        )
        self.policy = policy
        self.hyp.initialise()
        self.recorder.watch = Watch(self.hyp.mem, self.hyp.table.find, self.hyp.table.vms)
        self.bus = self.machine.host_bus
        self.engine = self.machine.engine
        self._next = memory.ram_base
        self.shown: tuple[int, ...] = ()
        """The registers from X0 on that the last VCPU_RUN returned."""

    # The host

    def x1(self, call: int, *args: int) -> int:
        """A hypercall that exists: its X1."""
        results = self.hyp.host_call(HOST_CALL_BASE + call, *args)
        assert results[0] == 0
        if call == HostCall.VCPU_RUN:
            self.shown = results
        return results[1]

    def call(self, call: HostCall, *args: int) -> int:
        """A hypercall that EL2 must not refuse."""
        result = self.x1(call, *args)
        assert result >= 0, (call.name, result, self.recorder.events[-2:])
        return result

    def pages(self, npages: int = 1, *, align: int = PAGE) -> int:
        """PA of pages of the host that nothing uses yet."""
        base = -(-self._next // align) * align
        self._next = base + npages * PAGE
        assert self._next <= self.firmware_pa
        return base

    def shared_page(self, words: dict[int, int] | None = None) -> int:
        """PA of a page shared with EL2, with these 64-bit words at these offsets."""
        pa = self.pages()
        self.bus.write(pa, bytes(PAGE))
        for offset, value in (words or {}).items():
            self.bus.write_u64(pa + offset, value)
        self.call(HostCall.HOST_SHARE_HYP, pa >> 12)
        return pa

    def link(self, pas: Sequence[int]) -> int:
        """Write a linked list of pages; its head."""
        for pa, following in zip(pas, [*pas[1:], 0], strict=True):
            self.bus.write_u64(pa, following)
        return pas[0]

    def list_page(self, *entries: tuple[int, int, int]) -> int:
        """PA of a page with a donation list."""
        pa = self.pages(-(-24 * len(entries) // PAGE) or 1)
        for row, entry in enumerate(entries):
            for column, number in enumerate(entry):
                self.bus.write_u64(pa + 24 * row + 8 * column, number)
        return pa

    def vm(self, handle: int) -> Vm:
        """EL2's own object, for those who look inside."""
        return next(vm for vm in self.hyp.vms() if vm.handle == handle)

    def device(self) -> StreamMaster:
        """A device of the host's, as it does DMA."""
        assert self.machine.smmu is not None
        return self.machine.smmu.master(DMA_STREAM, "probe")

    # Looking on

    def sound(self) -> None:
        assert check_hyp(self.hyp) == []

    def refusals(self) -> list[Refusal]:
        return [event for event in self.recorder.events if isinstance(event, Refusal)]

    def events(self, kind: type[E]) -> list[E]:
        return [event for event in self.recorder.events if isinstance(event, kind)]

    @contextmanager
    def unchanged(self, *, tables: bool = True) -> Iterator[None]:
        """Assert that EL2's records, all tables and all of EL2's words stay as they are. Without
        `tables`: the shape of the host's tables may change, as after a donation that is undone."""
        mem = self.hyp.mem
        before, words, states = Snapshot(mem, self.hyp.vms()), self._words(), self._states()
        yield
        assert self._words() == words
        assert self._states() == states
        if tables:
            assert before.differences(Snapshot(mem, self.hyp.vms())) == []
        else:
            self.sound()

    def _words(self) -> dict[int, bytes]:
        """What lies in the areas of every VM and vCPU, by PA."""
        return {
            area.pa: bytes(area.words)
            for vm in self.hyp.vms()
            for area in (vm, *(vcpu for vcpu in vm.vcpus if vcpu is not None))
        }

    def _states(self) -> bytes:
        return self.hyp.mem.vmemmap.states.tobytes()

    def assert_refused(
        self, number: int, call: HostCall, *args: int, check_name: str = "", tables: bool = True
    ) -> None:
        """The call gives -errno, announces why, and changes nothing (see `unchanged`)."""
        known = len(self.refusals())
        with self.unchanged(tables=tables):
            assert self.x1(call, *args) == -number, (call.name, errno.errorcode[number])
        (refusal,) = self.refusals()[known:]
        assert refusal.errno == number
        assert refusal.why
        if check_name:
            assert refusal.check == check_name


class Guest:
    """A VM: RAM of `ram_pages` at RAM_IPA, filled with `code` from its start; `vcpus` vCPUs.

    A protected one gets everything donated and its firmware; a non-protected one gets its RAM
    shared page by page as it is made (`vcpus[0]` loaded meanwhile).
    """

    def __init__(
        self,
        el2: El2,
        code: Sequence[int] = (a64.WFI,),
        *,
        protected: bool = True,
        vcpus: int = 1,
        created_vcpus: int | None = None,
        ram_pages: int = 4,
        tables: int = 8,
        block: bool = False,
        features: int = 0,
        firmware: bool = True,
    ) -> None:
        self.el2 = el2
        self.protected = protected
        self.features = features
        self.handle = el2.call(HostCall.RESERVE_VM)
        self.page = el2.shared_page(
            {
                HostVm.HANDLE: self.handle,
                HostVm.PROTECTED: int(protected),
                HostVm.CREATED_VCPUS: created_vcpus or vcpus,
            }
        )
        self.area = el2.pages(VM_AREA_BYTES // PAGE)
        root = el2.call(HostCall.PGD_INFO)
        self.root = el2.pages(root // PAGE, align=root)
        el2.call(HostCall.INIT_VM, self.page, self.area, self.root)
        self.tables = [el2.pages() for _ in range(tables)]
        if tables:
            el2.call(HostCall.TOPUP_MEMCACHE, self.handle, el2.link(self.tables), tables)
        self.firmware = firmware and el2.policy.isolation is not None
        if self.firmware and protected and el2.policy == ANDROID:
            self._name_firmware()
        self.vcpus: list[int] = []
        self.areas: list[int] = []
        for index in range(vcpus):
            self.add_vcpu(index)
        self.ram_pages = 512 if block else ram_pages
        self.ram = el2.pages(self.ram_pages, align=BLOCK if block else PAGE)
        el2.bus.write(self.ram, a64.code(code))
        self.slot = el2.pages(SLOT_BYTES // PAGE)
        if protected:
            self._donate()
        else:
            self._lend()

    @property
    def shown(self) -> tuple[int, ...]:
        """What the last VCPU_RUN returned (`RunResult`)."""
        return self.el2.shown

    @property
    def vm(self) -> Vm:
        return self.el2.vm(self.handle)

    def vcpu(self, index: int = 0) -> Vcpu:
        vcpu = self.vm.vcpus[index]
        assert vcpu is not None
        return vcpu

    def add_vcpu(self, index: int, vcpu_id: int | None = None, *, stopped: bool = True) -> None:
        """`stopped`: the host does not mean this one to start by itself; of a VM's first vCPU it
        always does."""
        page = self.el2.shared_page(
            {
                HostVcpu.VCPU_ID: index if vcpu_id is None else vcpu_id,
                HostVcpu.VCPU_IDX: index,
                HostVcpu.FEATURES: self.features,
                HostVcpu.MP_STATE: 5 if stopped and index else 0,
                HostVcpu.PSTATE: PSTATE_RESET,
                HostVcpu.PC: RAM_IPA,
                SCTLR: SCTLR_EL1_RESET,
            }
        )
        self.vcpus.append(page)
        self.areas.append(self.el2.pages(VCPU_AREA_BYTES // PAGE))
        self.el2.call(HostCall.INIT_VCPU, self.handle, page, self.areas[-1])
        self.set(HostVcpu.X, RAM_IPA, index)

    def _donate(self) -> None:
        el2 = self.el2
        el2.bus.write(self.slot, b"host" * (SLOT_BYTES // 4))
        if self.firmware and el2.policy != ANDROID:
            self._name_firmware()
        listing = el2.list_page(
            (self.ram >> 12, RAM_IPA >> 12, self.ram_pages),
            (self.slot >> 12, FIRMWARE_IPA >> 12, SLOT_BYTES >> 12),
        )
        el2.call(HostCall.DONATE_GUEST_SGLIST, self.handle, listing, 2)

    def _name_firmware(self) -> None:
        self.el2.call(HostCall.SET_FIRMWARE, self.handle, FIRMWARE_IPA, SLOT_BYTES)

    def _lend(self) -> None:
        self.load()
        for page in range(self.ram_pages):
            gfn = (RAM_IPA >> 12) + page
            self.el2.call(HostCall.HOST_SHARE_GUEST, (self.ram >> 12) + page, gfn, 1, 7)
        self.el2.call(HostCall.VCPU_PUT)

    # The host's page of a vCPU

    def word(self, offset: int, index: int = 0) -> int:
        return self.el2.bus.read_u64(self.vcpus[index] + offset)

    def set(self, offset: int, value: int, index: int = 0) -> None:
        self.el2.bus.write_u64(self.vcpus[index] + offset, value)

    def x(self, number: int, index: int = 0) -> int:
        return self.word(HostVcpu.X + 8 * number, index)

    # Running

    def load(self, index: int = 0, hcr: int = 3 << 13) -> None:
        self.el2.call(HostCall.VCPU_LOAD, self.handle, index, hcr)

    def run(self, index: int = 0, *, flags: int = 0, x0: int = 0, nr_lrs: int = 0) -> ExitCode:
        """Load, run with the host's answer until an exit, put."""
        self.load(index)
        code = ExitCode(self.el2.call(HostCall.VCPU_RUN, flags, x0, nr_lrs))
        self.el2.call(HostCall.VCPU_PUT)
        return code

    def feed(self, index: int = 0) -> None:
        """Answer a HYP_REQ."""
        assert self.shown[RunResult.REQ_TYPE] == HypRequest.MEMCACHE
        npages = self.shown[RunResult.REQ_PAGES]
        pages = [self.el2.pages() for _ in range(npages)]
        self.el2.call(HostCall.TOPUP_MEMCACHE, self.handle, self.el2.link(pages), npages)

    def esr(self, index: int = 0) -> int:
        return self.shown[RunResult.ESR]

    def ec(self, index: int = 0) -> int:
        return self.esr(index) >> 26

    def ram_word(self, offset: int) -> int:
        """A 64-bit word of the guest's RAM as EL2 and the hardware see it."""
        return self.el2.machine.memory.read_u64(self.ram + offset)

    def end(self) -> None:
        """Tear the VM down as a host does."""
        el2 = self.el2
        el2.call(HostCall.START_TEARDOWN_VM, self.handle)
        if self.protected:
            for gfn, nr in (
                (RAM_IPA >> 12, self.ram_pages),
                (FIRMWARE_IPA >> 12, SLOT_BYTES >> 12),
            ):
                el2.call(HostCall.RECLAIM_DYING_GUEST_RANGE, self.handle, gfn, nr)
        else:
            for page in range(self.ram_pages):
                gfn = (RAM_IPA >> 12) + page
                el2.call(HostCall.HOST_UNSHARE_GUEST, self.handle, gfn, 1)
        el2.call(HostCall.FINALIZE_TEARDOWN_VM, self.handle)
