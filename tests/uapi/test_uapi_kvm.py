# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers and layouts of the user ABI, against include/uapi/linux/kvm.h and arm64's asm/kvm.h."""

from __future__ import annotations

import errno

import pytest

from pkvm.arm64.registers import MPIDR_EL1, VBAR_EL1
from pkvm.uapi import kvm
from pkvm.uapi.errors import ProtectedPageError


def test_request_numbers() -> None:
    assert {request.name: hex(request) for request in kvm.Ioctl} == {
        "GET_API_VERSION": "0xae00",
        "CREATE_VM": "0xae01",
        "CHECK_EXTENSION": "0xae03",
        "GET_VCPU_MMAP_SIZE": "0xae04",
        "CREATE_VCPU": "0xae41",
        "GET_DIRTY_LOG": "0x4010ae42",
        "SET_USER_MEMORY_REGION": "0x4020ae46",
        "SET_USER_MEMORY_REGION2": "0x40a0ae49",
        "CREATE_IRQCHIP": "0xae60",
        "IRQ_LINE": "0x4008ae61",
        "IRQFD": "0x4020ae76",
        "RUN": "0xae80",
        "GET_MP_STATE": "0x8004ae98",
        "SET_MP_STATE": "0x4004ae99",
        "SET_GUEST_DEBUG": "0x4208ae9b",
        "GET_VCPU_EVENTS": "0x8040ae9f",
        "SET_VCPU_EVENTS": "0x4040aea0",
        "ENABLE_CAP": "0x4068aea3",
        "GET_ONE_REG": "0x4010aeab",
        "SET_ONE_REG": "0x4010aeac",
        "ARM_VCPU_INIT": "0x4020aeae",
        "ARM_PREFERRED_TARGET": "0x8020aeaf",
        "GET_REG_LIST": "0xc008aeb0",
        "CLEAR_DIRTY_LOG": "0xc018aec0",
        "CREATE_DEVICE": "0xc00caee0",
        "SET_DEVICE_ATTR": "0x4018aee1",
        "GET_DEVICE_ATTR": "0x4018aee2",
        "HAS_DEVICE_ATTR": "0x4018aee3",
    }


def test_a_requests_size_is_that_of_its_structure() -> None:
    sizes = {
        kvm.Ioctl.SET_USER_MEMORY_REGION: kvm.MEMORY_REGION.size,
        kvm.Ioctl.GET_MP_STATE: kvm.MP_STATE.size,
        kvm.Ioctl.ENABLE_CAP: kvm.ENABLE_CAP.size,
        kvm.Ioctl.GET_DIRTY_LOG: kvm.DIRTY_LOG.size,
        kvm.Ioctl.CLEAR_DIRTY_LOG: kvm.CLEAR_DIRTY_LOG.size,
        kvm.Ioctl.SET_GUEST_DEBUG: kvm.GUEST_DEBUG.size,
        kvm.Ioctl.GET_VCPU_EVENTS: kvm.VCPU_EVENTS.size,
        kvm.Ioctl.GET_ONE_REG: kvm.ONE_REG.size,
        kvm.Ioctl.ARM_VCPU_INIT: kvm.VCPU_INIT.size,
        kvm.Ioctl.CREATE_DEVICE: kvm.CREATE_DEVICE.size,
        kvm.Ioctl.SET_DEVICE_ATTR: kvm.DEVICE_ATTR.size,
        kvm.Ioctl.IRQ_LINE: kvm.IRQ_LEVEL.size,
        kvm.Ioctl.IRQFD: kvm.IRQFD.size,
    }
    for request, size in sizes.items():
        assert request >> 16 & 0x3FFF == size
    assert kvm.PROTECTED_VM_INFO.size == 64
    assert kvm.DmaCopy.ARGS.size == kvm.DmaCopy.COPY >> 16 & 0x3FFF


def test_irq_numbers() -> None:
    assert kvm.irq_number(kvm.IrqType.SPI, 33) == 0x0100_0021
    assert kvm.irq_number(kvm.IrqType.PPI, 27, 0x103) == 0x1203_001B
    assert kvm.redist_region(1, 0x80A_0000, 4) == 4 << 52 | 0x80A_0001


def test_enable_cap_layout() -> None:
    packed = kvm.ENABLE_CAP.pack(199, 1, 2, 3, 4, 5)
    assert packed[:16] == bytes([199, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
    assert packed[40:] == bytes(64)


def test_kvm_run_layout() -> None:
    page = bytearray(256)
    kvm.Run.MMIO.pack_into(page, kvm.Run.UNION, 0x0900_0018, 0x41, 1, 1)
    assert page[32:40] == (0x0900_0018).to_bytes(8, "little")
    assert page[40:48] == b"A" + bytes(7)
    assert page[48:53] == b"\1\0\0\0\1"
    kvm.Run.SYSTEM_EVENT.pack_into(page, kvm.Run.UNION, 2, 1, 7, *[0] * 15)
    assert page[32:48] == b"\2\0\0\0\1\0\0\0\7" + bytes(7)
    assert (kvm.Run.IMMEDIATE_EXIT, kvm.Run.EXIT_REASON) == (1, 8)


@pytest.mark.parametrize(
    ("register", "expected"),
    [
        (kvm.reg_x(0), 0x6030_0000_0010_0000),
        (kvm.reg_x(1), 0x6030_0000_0010_0002),
        (kvm.reg_x(30), 0x6030_0000_0010_003C),
        (kvm.REG_SP, 0x6030_0000_0010_003E),
        (kvm.REG_PC, 0x6030_0000_0010_0040),
        (kvm.REG_PSTATE, 0x6030_0000_0010_0042),
        (kvm.REG_SP_EL1, 0x6030_0000_0010_0044),
        (kvm.REG_ELR_EL1, 0x6030_0000_0010_0046),
        (kvm.REG_SPSR_EL1, 0x6030_0000_0010_0048),
        (kvm.reg_v(0), 0x6040_0000_0010_0054),
        (kvm.reg_v(31), 0x6040_0000_0010_00D0),
        (kvm.REG_FPSR, 0x6020_0000_0010_00D4),
        (kvm.REG_FPCR, 0x6020_0000_0010_00D5),
        (kvm.sysreg(MPIDR_EL1.one_reg), 0x6030_0000_0013_C005),
        (kvm.sysreg(VBAR_EL1.one_reg), 0x6030_0000_0013_C600),
        (kvm.REG_PSCI_VERSION, 0x6030_0000_0014_0000),
    ],
)
def test_one_reg_ids(register: int, expected: int) -> None:
    assert register == expected


def test_registers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="X31"):
        kvm.reg_x(31)
    with pytest.raises(ValueError, match="V32"):
        kvm.reg_v(32)


def test_a_protected_page_is_efault_with_its_address() -> None:
    error = ProtectedPageError(0x7F00_0000_1234, "load")
    assert isinstance(error, OSError)
    assert error.errno == errno.EFAULT
    assert error.address == 0x7F00_0000_1234
    assert "load of 0x7f0000001234" in str(error)
