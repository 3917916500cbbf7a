# SPDX-License-Identifier: GPL-2.0-or-later
"""Android's guest firmware: each page of it is there when the guest first touches it, whatever the
VMM has put there, until the guest gives one of them up (facts §8.1).
"""

from __future__ import annotations

import errno

from fakes import a64
from fakes.contract_rig import PAGE, errno_of
from fakes.dialect_rig import CODE_BYTES, CODE_IPA, FREE_IPA, Party, party
from pkvm.arm64.smccc import Function
from pkvm.check.invariants import check_hyp
from pkvm.kvm import Mmio, Vcpu

FW_IPA = CODE_IPA + 4 * PAGE
SECOND, THIRD = FW_IPA + PAGE, FW_IPA + 2 * PAGE
MAILBOX = 0xA00_0000
TELL = [*a64.mov(3, MAILBOX), a64.store(4, 3, size=3)]
"""X4 to a device."""


def load(ipa: int) -> list[int]:
    return [*a64.mov(5, ipa), a64.load(4, 5, size=3), *TELL]


def hvc(function: int, x1: int) -> list[int]:
    zero = [word for number in (2, 3) for word in a64.mov(number, 0)]
    return [*a64.mov(0, function), *a64.mov(1, x1), *zero, a64.HVC]


GUARD = [*hvc(Function.MMIO_GUARD_MAP, MAILBOX)]
IMAGE = (
    a64.code(
        [
            *GUARD,
            *load(THIRD),
            *load(SECOND - 8),
            *hvc(Function.MEM_RELINQUISH, THIRD),
            *load(THIRD),
            *load(SECOND),
            *load(CODE_IPA),
            a64.LOOP,
        ]
    ).ljust(PAGE - 8, b"\0")
    + b"page one"
    + b"page two" * (PAGE // 8)
    + b"number 3" * (PAGE // 8)
)
"""Three pages. The first tells what is in the others, before and after it gives up the third."""


def word(text: bytes) -> int:
    return int.from_bytes(text, "little")


def told(vcpu: Vcpu) -> int:
    exit_ = vcpu.run()
    assert isinstance(exit_, Mmio)
    assert (exit_.address, exit_.is_write) == (MAILBOX, True)
    return exit_.data


def owned(made: Party) -> int:
    """Pages that the guest has."""
    return made.system.census().guest["owned"]


def test_page_by_page_until_the_guest_gives_one_up() -> None:
    with party("android", firmware=IMAGE, misalign=True) as made:
        made.code.write(0, b"the VMM\0" * (CODE_BYTES // 8))
        made.vm.set_firmware_address(FW_IPA)
        vcpu = made.vcpu()
        assert owned(made) == 0
        assert told(vcpu) == word(b"number 3")
        assert owned(made) == 2, "the second page was not touched yet"
        assert check_hyp(made.system.hyp) == []
        assert told(vcpu) == word(b"page one")
        assert made.code.read(5 * PAGE, 8) == b"the VMM\0"
        assert told(vcpu) == 0, "relinquished: zeroed, and the host's"
        assert told(vcpu) == word(b"the VMM\0"), "it has done with its firmware"
        assert told(vcpu) == word(b"the VMM\0")
        assert owned(made) == 4


def test_a_block_around_the_firmware_is_filled_where_the_firmware_is() -> None:
    with party("android", firmware=IMAGE) as made:
        made.code.write(0, b"the VMM\0" * (CODE_BYTES // 8))
        made.vm.set_firmware_address(FW_IPA)
        vcpu = made.vcpu()
        assert told(vcpu) == word(b"number 3")
        assert owned(made) == CODE_BYTES // PAGE
        for expected in (b"page one", bytes(8), b"page two", b"the VMM\0"):
            assert told(vcpu) == word(expected)


def test_where_the_firmware_can_be() -> None:
    for ipa, number in ((FREE_IPA, errno.EFAULT), (CODE_IPA + CODE_BYTES - PAGE, errno.EFAULT),
                        (FW_IPA + 8, errno.EINVAL)):  # fmt: skip
        with party("android", firmware=IMAGE) as made:
            made.vm.set_firmware_address(ipa)
            vcpu = made.vcpu()
            assert errno_of(vcpu.run) == errno_of(vcpu.run) == number
            made.vm.set_firmware_address(FW_IPA)
            assert told(vcpu) == word(b"number 3"), "nothing had changed"


def test_only_what_the_guest_touches_counts_as_locked() -> None:
    with party("android", firmware=IMAGE, misalign=True, memlock=2 * PAGE) as made:
        made.vm.set_firmware_address(FW_IPA)
        vcpu = made.vcpu()
        assert told(vcpu) == word(b"number 3")
        assert made.system.host.memlock.pages == 2
