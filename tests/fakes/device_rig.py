# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected guest that was given the copy engine, and calls EL2 about it, on a real machine."""

from __future__ import annotations

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PAGE, RAM_IPA, El2, Guest
from pkvm.arm64.smccc import SUCCESS, Function, PviommuOp
from pkvm.hyp.abi import ExitCode, HostCall, HypRequest, RunResult
from pkvm.hyp.policy import ANDROID
from pkvm.machine.dma import CTRL, CTRL_START, DST, LEN, SRC
from pkvm.machine.machine import DMA_BASE

PVIOMMU, VSID = 7, 0x21
DEVICE_IPA = 0x900_0000
"""Where the guest has the copy engine's registers."""
ASSIGN, MAP_DEVICE = HostCall.ASSIGN_DEVICE, HostCall.MAP_DEVICE_GUEST
R, W = 1, 2
RW = R | W
PRIVATE = RAM_IPA + PAGE
"""The first of the guest's pages that holds no code."""
IOVA = 0x12_3456_7000


class DeviceGuest:
    """A guest at a WFI, in `el2` or one of its own; it makes the calls that a test wants."""

    def __init__(self, el2: El2 | None = None, *, tables: int = 12, ram_pages: int = 8) -> None:
        self.el2 = el2 or El2(policy=ANDROID)
        code = [a64.WFI, a64.HVC, 0x17FF_FFFE]
        self.guest = Guest(self.el2, code, firmware=False, tables=tables, ram_pages=ram_pages)
        self.handle = self.guest.handle
        end = self.guest.run()
        while end == ExitCode.IRQ:  # meant for the vCPU before
            end = self.guest.run()
        assert end == ExitCode.TRAP
        self.engine = self.el2.engine
        self.asked: list[int] = []
        """IPAs at which EL2 asked the host for a page."""

    def assign(self, pa: int = DMA_BASE, vsid: int = VSID) -> None:
        """The host gives the device away and maps its registers."""
        self.el2.call(ASSIGN, self.handle, pa, PVIOMMU, vsid)
        self.el2.call(MAP_DEVICE, self.handle, pa, DEVICE_IPA + pa - DMA_BASE >> 12)

    def start(self, *args: int) -> ExitCode:
        """The guest's HVC with these X0-X6; where it ends."""
        self.guest.load()
        self.el2.hyp.cpu._switch_to(self.guest.vcpu())
        for number, value in enumerate((*args, *[0] * 7)[:7]):
            self.engine.x[number] = value
        self.el2.call(HostCall.VCPU_PUT)
        return self.guest.run(flags=INCREMENT_PC)

    def hvc(self, *args: int) -> tuple[int, int, int, int]:
        """X0-X3 of a call; EL2 gets what it asks for."""
        code = self.start(*args)
        while code == ExitCode.HYP_REQ:
            if self.guest.shown[RunResult.REQ_TYPE] == HypRequest.MAP:
                self.donate(self.guest.shown[RunResult.REQ_IPA])
            else:
                self.guest.feed()
            code = self.guest.run()
        while self.guest.ec() != 1:  # told of a page that was given back
            code = self.guest.run()
        assert code == ExitCode.TRAP
        return self.engine.args()

    def donate(self, ipa: int) -> None:
        """A page for the guest at `ipa`."""
        self.asked.append(ipa)
        self.guest.load()
        self.el2.call(HostCall.HOST_DONATE_GUEST, self.el2.pages() >> 12, ipa >> 12, 1)
        self.el2.call(HostCall.VCPU_PUT)

    def op(self, op: PviommuOp, *args: int) -> tuple[int, int]:
        """X0 and X1 of PVIOMMU_OP."""
        return self.hvc(Function.PVIOMMU_OP, op, *args)[:2]

    def alloc(self) -> int:
        """A domain."""
        status, domain = self.op(PviommuOp.ALLOC_DOMAIN)
        assert status == SUCCESS
        return domain

    def attach(self, domain: int, vsid: int = VSID) -> int:
        """X0 of ATTACH."""
        return self.op(PviommuOp.ATTACH, PVIOMMU, vsid, 0, domain)[0]

    def detach(self, domain: int, vsid: int = VSID) -> int:
        """X0 of DETACH."""
        return self.op(PviommuOp.DETACH, PVIOMMU, vsid, 0, domain)[0]

    def map(
        self, domain: int, iova: int, ipa: int, nbytes: int = PAGE, prot: int = RW
    ) -> tuple[int, int]:
        """X0 and X1 of MAP."""
        return self.op(PviommuOp.MAP, domain, iova, ipa, nbytes, prot)

    def unmap(self, domain: int, iova: int, nbytes: int = PAGE) -> tuple[int, int]:
        """X0 and X1 of UNMAP."""
        return self.op(PviommuOp.UNMAP, domain, iova, nbytes)

    def pa(self, ipa: int) -> int:
        """Where a page of the guest's RAM really is."""
        return self.guest.ram + ipa - RAM_IPA

    def copy(self, source: int, destination: int, length: int) -> None:
        """Have the engine copy, by its registers, as whoever has them would."""
        memory = self.el2.machine.memory
        for register, value in (
            (SRC, source),
            (DST, destination),
            (LEN, length),
            (CTRL, CTRL_START),
        ):
            memory.write(DMA_BASE + register, value.to_bytes(8, "little"))
