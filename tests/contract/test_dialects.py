# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of the dialects, row by row: what three machines do, side by side (facts §2).

A row's function looks at what a machine does, with real guest code, and says
which of the table's answers that is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import a64
from fakes.contract_rig import PAGE, RAM_IPA, RAM_SLOT, errno_of
from fakes.dialect_rig import CODE_BYTES, CODE_IPA, CODE_SLOT, FREE_IPA, host, party
from pkvm import guests
from pkvm.arm64.smccc import INVALID_PARAMETER, NOT_SUPPORTED, Function
from pkvm.check.dialect_page import page
from pkvm.events import GuestExit
from pkvm.guests.agent import Agent, GuestExceptionError
from pkvm.guests.protocol import MAILBOX_BASE, Boot
from pkvm.hyp.policy import POLICIES
from pkvm.kvm import Mmio, Vm
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi import kvm as uapi
from pkvm.uapi.dialects import (
    ALWAYS_ASKED,
    DIALECTS,
    ROWS,
    Calls,
    Creation,
    Dialect,
    Dma,
    Filter,
    Firmware,
    Info,
    InitAgain,
    LostPage,
    Memory,
    Primary,
    Ranges,
    Registers,
    Setting,
    Slots,
    Smc,
    StolenTime,
    TypeBits,
    Unknown,
    Unprotected,
    Untouched,
    Vcpus,
)
from pkvm.uapi.errors import HostOopsError, ProtectedPageError

NAMES = tuple(DIALECTS)
RFC_CAP, ANDROID_CAP = 199, 0xFFBA_DAB1
PSCI_VERSION = 0x8400_0000
UNKNOWN_CALL = 0xC600_00FF
X5 = uapi.reg_x(5)
EINVAL, EPERM, EBUSY = errno.EINVAL, errno.EPERM, errno.EBUSY


ABORT = "ESR 0x96000010"
"""An external abort on a load or store, taken at EL1."""


def end_of(call: Callable[..., object], *args: object) -> object:
    """What a call gives; the errno or the guest's syndrome in words if it gives none."""
    try:
        return call(*args)
    except GuestExceptionError as exception:
        return f"ESR {exception.esr:#x}"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def creation(name: str) -> Creation:
    with host(name) as (_, kvm):
        by_type = errno_of(kvm.create_vm, uapi.TYPE_PROTECTED)
    with party(name, protect=False) as made:
        by_cap = errno_of(made.vm.protect, CODE_SLOT)
    assert sorted([by_type, by_cap]) == [0, EINVAL]
    return Creation.TYPE_BIT if by_cap else Creation.ENABLE_CAP


def capability(name: str) -> int | None:
    with host(name) as (_, kvm):
        found = [cap for cap in (RFC_CAP, ANDROID_CAP) if kvm.check_extension(cap)]
    return found[0] if found else None


def flags(name: str) -> dict[str, int]:
    """Flags 0 protect a VM or place its firmware; flags 1 ask for the firmware's size; flags 2 give
    a guest FF-A, which this host has not."""
    taken: dict[str, int] = {}
    with party(name, protect=False) as made:
        number = made.dialect.capability
        for value in range(4 if number is not None else 0):
            buffer = made.kvm.mmap(PAGE)
            args = (buffer.address,) if value else (CODE_SLOT,)
            try:
                made.vm.enable_cap(number or 0, value, args)
            except OSError as error:
                if error.errno == EINVAL and "FF-A" in str(error):
                    taken["SET_FFA"] = value
                continue
            if value:
                assert buffer.read(0, 8) != bytes(8)
                taken["INFO"] = value
            else:
                by_cap = made.dialect.creation is Creation.ENABLE_CAP
                taken["ENABLE" if by_cap else "SET_FW_IPA"] = 0
    return taken


def unprotected(name: str) -> Unprotected:
    with host(name, protected=False) as (_, kvm), kvm.create_vm() as vm:
        assert [kvm.check_extension(cap) for cap in (RFC_CAP, ANDROID_CAP)] == [0, 0]
        assert errno_of(kvm.create_vm, uapi.TYPE_PROTECTED) == EINVAL
        if DIALECTS[name].creation is Creation.TYPE_BIT:
            return Unprotected.EINVAL
        assert errno_of(vm.protect, CODE_SLOT) == EINVAL
        return Unprotected.CAP_IS_ZERO


def type_bits(name: str) -> TypeBits:
    with host(name) as (_, kvm):
        bits = [bit for bit in range(64) if _is_type(kvm.create_vm, 1 << bit)]
    if bits == [*range(8)]:
        return TypeBits.IPA_SIZE
    assert bits == [*range(8), 31]
    return TypeBits.IPA_SIZE_AND_PROTECTED


def _is_type(create: Callable[[int], Vm], kind: int) -> bool:
    made = end_of(create, kind)
    if isinstance(made, Vm):
        made.close()
        return True
    assert made == "EINVAL"
    return False


def filtered(name: str) -> Filter:
    with party(name) as made:
        asked = set(uapi.Cap) - {uapi.Cap.MSI_DEVID, uapi.Cap.ARM_CACHEABLE_PFNMAP_SUPPORTED}
        of_system = {cap: made.kvm.check_extension(cap) for cap in asked}
        of_vm = {cap: made.vm.check_extension(cap) for cap in asked}
        own = made.vm.check_extension(made.dialect.capability or 0)
    hidden = {cap for cap in of_system if of_system[cap] != of_vm[cap]}
    if not hidden:
        return Filter.NONE
    assert hidden <= {cap for cap in uapi.Cap if cap not in ALWAYS_ASKED}
    assert uapi.Cap.ONE_REG in hidden
    with host(name) as (_, kvm), kvm.create_vm() as vm:
        assert all(vm.check_extension(cap) == of_system[cap] for cap in asked)
    return Filter.ANDROID if name == "android" and own else Filter.UPSTREAM


FIRMWARE = a64.code(
    [
        *a64.mov(0, Function.MMIO_GUARD_MAP),
        *a64.mov(1, MAILBOX_BASE),
        a64.HVC,
        *a64.mov(3, MAILBOX_BASE),
        a64.store(15, 3, size=3),
        a64.store(0, 3, size=3),
        a64.LOOP,
    ]
)
"""Stores X15 and what MMIO_GUARD_MAP answered."""


def firmware(name: str) -> Firmware:
    """Where a guest begins, whatever the VMM says of its PC."""
    with party(name, firmware=FIRMWARE) as made:
        begin = made.code.read(0, 4) if made.dialect.firmware is not Firmware.SLOT else b""
        if made.dialect.firmware is Firmware.ADDRESS:
            made.vm.set_firmware_address(CODE_IPA + PAGE)
        vcpu = made.vcpu()
        vcpu.set_reg("pc", CODE_IPA)
        exit_ = vcpu.run()
        assert isinstance(exit_, Mmio)
        if made.dialect.firmware is Firmware.NONE:
            # The agent, which the VMM put there, asks for a command.
            assert begin == guests.image("agent")[:4]
            assert (exit_.address, exit_.is_write) == (MAILBOX_BASE, False)
            return Firmware.NONE
        assert (exit_.address, exit_.is_write, exit_.data) == (MAILBOX_BASE, True, 0)
        exit_ = vcpu.run()
        assert isinstance(exit_, Mmio)
        if exit_.data:
            assert exit_.data == NOT_SUPPORTED
            return Firmware.SLOT
        # It has the MMIO guard from the start, and too late is too late.
        assert errno_of(made.vm.set_firmware_address, CODE_IPA) == EBUSY
    with party(name, firmware=FIRMWARE) as made:
        made.agent()
    return Firmware.ADDRESS


def info(name: str) -> Info:
    with party(name) as made:
        number = made.dialect.capability
        if number is None:
            for cap in (RFC_CAP, ANDROID_CAP):
                assert errno_of(made.vm.protected_vm_info, cap=cap) == EINVAL
            return Info.NONE
        size = made.vm.protected_vm_info(cap=number).firmware_size
        assert size >= len(guests.image("agent"))
        made.agent()
        assert made.vm.protected_vm_info(cap=number).firmware_size == size
        sized = errno_of(made.vm.protected_vm_info, 64, cap=number)
    if not sized:
        return Info.ANY_TIME
    with host(name) as (_, kvm), kvm.create_vm() as vm:
        assert errno_of(vm.protected_vm_info, cap=number) == EINVAL
    return Info.ANY_TIME_WHOLE


def primary(name: str) -> Primary:
    """Both vCPUs are RUNNABLE, and the second one runs first."""
    with party(name) as made:
        first, second = made.vcpu(0), made.vcpu(1)
        assert isinstance(second.run(), Mmio)
        end = end_of(first.run)
    if end == "EPERM":
        return Primary.FIRST_TO_ENTER
    assert isinstance(end, Mmio)
    if DIALECTS[name].firmware is Firmware.NONE:
        return Primary.ANY
    with party(name, firmware=FIRMWARE) as made:
        made.vm.set_firmware_address(CODE_IPA)
        first, second = made.vcpu(0), made.vcpu(1)
        assert isinstance(first.run(), Mmio)
        assert errno_of(second.run) == EINVAL
    return Primary.RUNNABLE


def calls(name: str) -> Calls:
    """By what the versions are, and whether the host sees the calls."""
    with party(name) as made:
        agent = made.agent()
        before = made.recorder.counts(GuestExit).get("hvc", 0)
        versions = [agent.hvc(function)[0] for function in (PSCI_VERSION, Function.SMCCC_VERSION)]
        trng = agent.hvc(Function.TRNG_VERSION)[0]
        seen = made.recorder.counts(GuestExit).get("hvc", 0) - before
        assert trng == 0x1_0000
        status, high, middle, low = agent.hvc(Function.TRNG_RND64, 192)[:4]
        assert (status, len({high, middle, low, 0})) == (0, 4)
        assert agent.hvc(Function.TRNG_RND64, 193)[0] == -2 & (1 << 64) - 1
        assert agent.hvc(Function.VENDOR_UID)[0] == 0xB66F_B428
    if versions == [0x1_0001, 0x1_0002]:
        assert seen == 0
        return Calls.EL2
    assert (versions, seen) == ([0x1_0003, 0x1_0001], 3)
    with party(name) as made:
        vcpu = made.vcpu()
        vcpu.set_one_reg(uapi.REG_PSCI_VERSION, 2)
        assert errno_of(vcpu.set_one_reg, uapi.REG_PSCI_VERSION, 3) == EINVAL
        agent = Agent(vcpu)
        agent.start()
        assert agent.hvc(PSCI_VERSION)[0] == 2
    return Calls.HOST


def unknown_call(name: str) -> Unknown:
    with party(name) as made:
        agent = made.agent()
        before = made.recorder.counts(GuestExit).get("hvc", 0)
        assert agent.hvc(UNKNOWN_CALL, 1, 2, 3)[:4] == (NOT_SUPPORTED, 0, 0, 0)
        seen = made.recorder.counts(GuestExit).get("hvc", 0) - before
    return Unknown.TO_HOST if seen else Unknown.NOT_SUPPORTED


def smc(name: str) -> Smc:
    with party(name) as made:
        agent = made.agent()
        answer = agent.smc(PSCI_VERSION)[0]
        if answer == NOT_SUPPORTED:
            return Smc.NOT_SUPPORTED
        assert answer == agent.hvc(PSCI_VERSION)[0]
        assert agent.execute(0xD400_0023, x=(PSCI_VERSION,))[0] == NOT_SUPPORTED  # SMC #1
        return Smc.AS_HVC


def time_of_day(name: str) -> bool:
    """Whether or not KVM_FEATURES says so: Linux's does not."""
    with party(name) as made:
        agent = made.agent()
        assert not agent.hvc(Function.KVM_FEATURES)[0] & 2
        answer = agent.hvc(Function.KVM_PTP, 0)[0]
    return answer != NOT_SUPPORTED


def stolen_time(name: str) -> StolenTime:
    """More in test_stolen_time.py."""
    with party(name) as made:
        agent = made.agent()
        assert agent.hvc(Function.PV_TIME_ST)[0] == NOT_SUPPORTED
        errno_of(made.vcpus[0].set_attr, uapi.PVTIME_CTRL, uapi.PVTIME_IPA, RAM_IPA)
        agent.store(RAM_IPA, 0)
        assert agent.hvc(Function.MEM_SHARE, RAM_IPA)[0] == 0
        there = agent.hvc(Function.PV_TIME_ST)[0] == RAM_IPA
    return StolenTime.SHARED if there else StolenTime.NONE


def registers(name: str) -> Registers:
    """What the host reads of a guest that waits in its mailbox."""
    with party(name) as made:
        agent = made.agent()
        agent.write_sysreg(3, 0, 13, 0, 4, 0x5EC2E7)  # TPIDR_EL1
        vcpu = made.vcpus[0]
        tpidr = vcpu.get_one_reg(uapi.sysreg(0xC684))
        in_agent = CODE_IPA < vcpu.get_reg("pc") < CODE_IPA + CODE_BYTES
    assert (tpidr == 0x5EC2E7) == in_agent
    return Registers.VISIBLE if in_agent else Registers.HIDDEN


def set_one_reg(name: str) -> Setting:
    with party(name) as made:
        vcpu = made.vcpu()
        vcpu.set_reg("x0", 0xA0)
        vcpu.set_reg("x5", 0xA5)
        vcpu.set_reg("x16", 0xB0)
        vcpu.set_reg("pc", CODE_IPA)
        agent = Agent(vcpu)
        agent.start()
        words = agent.boot_state()
        kept = [words[Boot.X0 + n] for n in (0, 5, 16)]
        vcpu.set_reg("pstate", vcpu.get_reg("pstate"))
        tpidr = uapi.sysreg(0xC684)
        vcpu.set_one_reg(tpidr, 0x1234)
        later = agent.read_sysreg(3, 0, 13, 0, 4)
    if later == 0x1234:
        assert kept == [0xA0, 0xA5, 0xB0]
        return Setting.ALWAYS
    assert kept[2] == 0
    return Setting.FIRMWARE_ARGUMENTS if kept == [0xA0, 0xA5, 0] else Setting.FIRST_RUN


def vcpu_init_again(name: str) -> InitAgain:
    with party(name) as made:
        agent = made.agent()
        agent.store(RAM_IPA, 7)
        vcpu = made.vcpus[0]
        vcpu.init()
        if made.dialect.registers is Registers.VISIBLE:
            assert vcpu.get_reg("pc") == 0
            vcpu.set_reg("pc", CODE_IPA)
            again = Agent(vcpu)
            again.start()
            assert again.load(RAM_IPA) == 7
            return InitAgain.RESETS
        # The MMIO exit that the VMM did not answer is forgotten: the guest reads 0 from it, which
        # is the load made again.
        exit_ = vcpu.run()
        assert isinstance(exit_, Mmio)
        assert (exit_.address, exit_.is_write) == (MAILBOX_BASE, False)
        return InitAgain.IGNORED


def memory(name: str) -> Memory:
    with party(name) as made:
        before = made.system.census().guest["owned"]
        agent = made.agent()
        agent.load(CODE_IPA)
        running = made.system.census().guest["owned"]
        agent.load(RAM_IPA + PAGE)
        touched = made.system.census().guest["owned"] - running
        if before:
            assert touched == 0
            assert before == running == (made.ram.length + CODE_BYTES) // PAGE
            return Memory.AT_ENABLE
        assert running
        made.ram.close()
        assert agent.load(RAM_IPA + PAGE) == 0
        # What nobody pinned is gone with its mapping.
        assert errno_of(agent.load, RAM_IPA + (3 << 20)) == errno.EFAULT
    return {1: Memory.TOUCHED_PAGES, 512: Memory.TOUCHED_BLOCKS}[touched]


def slots(name: str) -> Slots:
    with party(name, protect=False) as made:
        region, more = made.vm.set_user_memory_region, made.kvm.mmap(PAGE)
        flagged = [
            errno_of(region, 5 + flag, FREE_IPA + flag * PAGE, more, flags=flag)
            for flag in (uapi.MemFlag.LOG_DIRTY_PAGES, uapi.MemFlag.READONLY)
        ]
        if made.dialect.creation is Creation.ENABLE_CAP:
            assert flagged == [0, 0]
            assert [errno_of(made.vm.protect, slot) for slot in (6, 7)] == [EINVAL, EINVAL]
        else:
            assert flagged == [EPERM, EPERM]
            assert errno_of(region, 5, FREE_IPA, more) == 0
            assert errno_of(region, 5, FREE_IPA + PAGE, more) == 0
            assert errno_of(region, 5, FREE_IPA, None) == 0
    with party(name) as made:
        made.agent()
        region, more = made.vm.set_user_memory_region, made.kvm.mmap(PAGE)
        changes = [
            errno_of(region, 5, FREE_IPA, more),
            errno_of(region, RAM_SLOT, FREE_IPA + (1 << 30), made.ram),
            errno_of(region, RAM_SLOT, RAM_IPA, None),
            errno_of(region, RAM_SLOT, RAM_IPA, made.ram, flags=uapi.MemFlag.LOG_DIRTY_PAGES),
        ]
    if changes == [EPERM] * 4:
        return Slots.ALL_AFTER_ENABLE
    assert changes == [0, EPERM, EPERM, EPERM]
    return Slots.GONE_AFTER_RUN


def vcpus(name: str) -> Vcpus:
    with party(name) as made:
        made.agent()
        late = made.vcpu(1, power_off=True)
        late.mp_state = uapi.MpState.RUNNABLE
        [vm] = made.system.hyp.vms()
        if len(vm.vcpus) > 1 and vm.vcpus[1] is not None:
            return Vcpus.ALWAYS
        assert errno_of(late.run) == EINVAL
        return Vcpus.FIRST_RUN


def memlock(name: str) -> bool:
    with party(name, memlock=16 << 20) as made:
        agent = made.agent()
        lock = made.system.host.memlock
        counted = lock.pages
        agent.load(RAM_IPA)
        assert (lock.pages > counted) == (counted > 0)
        lock.limit = lock.pages * PAGE
        refused = errno_of(agent.load, RAM_IPA + (2 << 20))
        assert refused == (errno.ENOMEM if counted else 0)
        if refused:
            lock.limit = None
            agent.resume()
        host_ = made.system.host
    assert host_.memlock.pages == 0
    return bool(counted)


def lost_page(name: str) -> LostPage:
    with party(name) as made:
        agent = made.agent()
        agent.store(RAM_IPA, 0x5EC2E7)
        with pytest.raises(ProtectedPageError):
            made.ram.read(0, 8)
        with pytest.raises(ProtectedPageError):
            made.ram.syscall_read(0, 8)
        try:
            assert made.ram.forced_read(0, 8) == bytes(8)
        except HostOopsError:
            assert agent.load(RAM_IPA) == 0x5EC2E7
            return LostPage.OOPS
        assert made.ram.read(0, PAGE) == bytes(PAGE)
        made.ram.write(0, b"the host's again")
        end = end_of(agent.load, RAM_IPA)
        if end == "EFAULT":
            assert end_of(agent.resume) == "EFAULT"
    return {ABORT: LostPage.TAKEN, "EFAULT": LostPage.TAKEN_EFAULT}[str(end)]


def relinquish(name: str) -> bool:
    with party(name) as made:
        agent = made.agent()
        agent.store(RAM_IPA, 0x5EC2E7)
        answer = agent.hvc(Function.MEM_RELINQUISH, RAM_IPA)[0]
        if answer == NOT_SUPPORTED:
            return False
        assert answer == 0
        assert made.ram.read(0, 8) == bytes(8)
        made.ram.write(0, b"the host's again")
        assert agent.load(RAM_IPA, 1) == ord("t")
        with pytest.raises(ProtectedPageError):
            made.ram.read(0, 8)
        return True


def dma(name: str) -> Dma:
    """This machine's devices are behind a stage-2 in every dialect."""
    with party(name) as made:
        made.agent().store(RAM_IPA, 0x5EC2E7)
        buffer = made.kvm.mmap(PAGE)
        device = made.kvm.kernel.open("/dev/dma-copy")
        argument = bytearray(uapi.DmaCopy.ARGS.pack(made.ram.address, buffer.address, 8))
        copy = made.kvm.kernel.ioctl
        assert errno_of(copy, device, uapi.DmaCopy.COPY, argument) == errno.EIO
        made.kvm.kernel.close(device)
        assert buffer.read(0, 8) == bytes(8)
    return dict(zip(NAMES, (Dma.PROMISED, Dma.DRIVERS, Dma.MISSING), strict=True))[name]


def mmio_guard(name: str) -> bool:
    with party(name) as made:
        agent = made.agent()
        offered = agent.hvc(Function.KVM_FEATURES)[0] >> 7 & 1
        answer = agent.hvc(Function.MMIO_GUARD_INFO)[0]
        assert answer == (PAGE if offered else NOT_SUPPORTED)
        return bool(offered)


def ranges(name: str) -> Ranges:
    with party(name) as made:
        agent = made.agent()
        agent.store(RAM_IPA, 1)
        agent.store(RAM_IPA + PAGE, 1)
        answer, done = agent.hvc(Function.MEM_SHARE, RAM_IPA, 2)[:2]
        if answer == INVALID_PARAMETER:
            assert agent.hvc(Function.HYP_MEMINFO)[:2] == (PAGE, 0)
            assert agent.hvc(Function.MEM_SHARE, RAM_IPA)[:2] == (0, 0)
            return Ranges.ONE
        assert (answer, done) == (0, 2)
        assert agent.hvc(Function.HYP_MEMINFO)[:2] == (PAGE, 1)
        assert made.ram.read(0, 2 * PAGE)[::PAGE] == b"\1\1"
        return Ranges.MANY


def untouched_share(name: str) -> Untouched:
    """Of a page that has memory, and of one where the VM has none."""
    with party(name) as made:
        agent = made.agent()
        reasons = made.recorder.counts(GuestExit)
        assert agent.hvc(Function.MEM_SHARE, RAM_IPA + (2 << 20))[0] == 0
        now = made.recorder.counts(GuestExit)
        asked = now.get("hyp_req", 0) > reasons.get("hyp_req", 0)
        nowhere = end_of(agent.hvc, Function.MEM_SHARE, FREE_IPA)
    if isinstance(nowhere, tuple):
        assert nowhere[0] == INVALID_PARAMETER
        return Untouched.REFUSED
    ends = {(False, ABORT): Untouched.FAULT, (True, "EFAULT"): Untouched.REQUEST}
    return ends[asked, str(nowhere)]


def taints(name: str) -> bool:
    with party(name) as made, host(name) as (other, _):
        assert isinstance(other.recorder, CountingRecorder)
        assert not any("taint" in message.text for message in other.recorder.messages())
        if made.dialect.creation is Creation.TYPE_BIT:
            made.kvm.create_vm(uapi.TYPE_PROTECTED).close()
        said = [message for message in made.recorder.messages() if "taint" in message.text]
        assert len(said) < 2
        return bool(said)


ANSWERS: dict[str, tuple[Callable[[str], object], tuple[object, object, object]]] = {
    "creation": (creation, (Creation.ENABLE_CAP, Creation.TYPE_BIT, Creation.TYPE_BIT)),
    "capability": (capability, (199, 0xFFBA_DAB1, None)),
    "flags": (flags, ({"ENABLE": 0, "INFO": 1}, {"SET_FW_IPA": 0, "INFO": 1, "SET_FFA": 2}, {})),
    "unprotected": (
        unprotected,
        (Unprotected.CAP_IS_ZERO, Unprotected.EINVAL, Unprotected.EINVAL),
    ),
    "type_bits": (
        type_bits,
        (
            TypeBits.IPA_SIZE,
            TypeBits.IPA_SIZE_AND_PROTECTED,
            TypeBits.IPA_SIZE_AND_PROTECTED,
        ),
    ),
    "filter": (filtered, (Filter.NONE, Filter.ANDROID, Filter.UPSTREAM)),
    "firmware": (firmware, (Firmware.SLOT, Firmware.ADDRESS, Firmware.NONE)),
    "info": (info, (Info.ANY_TIME, Info.ANY_TIME_WHOLE, Info.NONE)),
    "primary": (primary, (Primary.FIRST_TO_ENTER, Primary.RUNNABLE, Primary.ANY)),
    "calls": (calls, (Calls.EL2, Calls.EL2, Calls.HOST)),
    "unknown_call": (
        unknown_call,
        (Unknown.NOT_SUPPORTED, Unknown.NOT_SUPPORTED, Unknown.TO_HOST),
    ),
    "smc": (smc, (Smc.NOT_SUPPORTED, Smc.NOT_SUPPORTED, Smc.AS_HVC)),
    "time_of_day": (time_of_day, (False, False, True)),
    "stolen_time": (stolen_time, (StolenTime.NONE, StolenTime.NONE, StolenTime.SHARED)),
    "registers": (registers, (Registers.HIDDEN, Registers.HIDDEN, Registers.VISIBLE)),
    "set_one_reg": (
        set_one_reg,
        (Setting.FIRMWARE_ARGUMENTS, Setting.FIRST_RUN, Setting.ALWAYS),
    ),
    "vcpu_init_again": (
        vcpu_init_again,
        (InitAgain.IGNORED, InitAgain.IGNORED, InitAgain.RESETS),
    ),
    "memory": (memory, (Memory.AT_ENABLE, Memory.TOUCHED_BLOCKS, Memory.TOUCHED_PAGES)),
    "slots": (slots, (Slots.ALL_AFTER_ENABLE, Slots.GONE_AFTER_RUN, Slots.GONE_AFTER_RUN)),
    "vcpus": (vcpus, (Vcpus.ALWAYS, Vcpus.FIRST_RUN, Vcpus.FIRST_RUN)),
    "memlock": (memlock, (False, True, True)),
    "lost_page": (lost_page, (LostPage.TAKEN, LostPage.OOPS, LostPage.TAKEN_EFAULT)),
    "relinquish": (relinquish, (False, True, False)),
    "dma": (dma, (Dma.PROMISED, Dma.DRIVERS, Dma.MISSING)),
    "mmio_guard": (mmio_guard, (False, True, False)),
    "ranges": (ranges, (Ranges.MANY, Ranges.MANY, Ranges.ONE)),
    "untouched_share": (
        untouched_share,
        (Untouched.REFUSED, Untouched.REQUEST, Untouched.FAULT),
    ),
    "taints": (taints, (False, False, True)),
}


@pytest.mark.parametrize("field", ANSWERS)
def test_the_three_dialects_side_by_side(field: str) -> None:
    observe, answers = ANSWERS[field]
    assert tuple(observe(name) for name in NAMES) == answers
    assert tuple(getattr(dialect, field) for dialect in DIALECTS.values()) == answers


def test_every_row_is_tested() -> None:
    assert [row.field for row in ROWS] == list(ANSWERS)
    beside = {"name", "caps"}
    assert {*ANSWERS, *beside} == set(Dialect.__dataclass_fields__)


def test_the_page_is_current() -> None:
    """Else: python -m pkvm.check.dialect_page > docs/dialects.md"""
    path = Path(__file__).parents[2] / "docs" / "dialects.md"
    assert path.read_text(encoding="utf-8") == page()


def test_what_users_see_and_what_el2_does_are_one_dialect() -> None:
    assert list(POLICIES) == list(DIALECTS)
    for name, dialect in DIALECTS.items():
        policy = POLICIES[name]
        assert (policy.isolation is not None) == (dialect.registers is Registers.HIDDEN)
        assert (policy.isolation is not None) == (dialect.calls is Calls.EL2)
        assert (Function.MEM_RELINQUISH in policy.vendor_calls) == dialect.relinquish
        assert (Function.MMIO_GUARD_MAP in policy.vendor_calls) == dialect.mmio_guard
        assert policy.has_range == (dialect.ranges is Ranges.MANY)
        assert policy.memory.force_reclaim == (dialect.lost_page is not LostPage.OOPS)
