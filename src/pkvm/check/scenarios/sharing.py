# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that a protected guest shares with the host, and takes back: MEM_SHARE and MEM_UNSHARE.

The hypercalls' numbers are those of the vendor range (SMCCC 1.1, ARM DEN 0028).
"""

from __future__ import annotations

from pkvm.check.scenarios.bench import CODE, DEVICE, FREE, PAGE, RAM, Bench
from pkvm.guests.protocol import Info

TITLE = "Page sharing"
SHARE = 0xC600_0003
UNSHARE = 0xC600_0004
_CPU_ON = 0xC400_0003
_NEVER = RAM + 8 * PAGE
"""A page that the guest never touches."""


def good_share_untouched(bench: Bench) -> None:
    """A page that the guest has not touched keeps what the host put there."""
    vm = bench.vm()
    vm.store(0, b"\x11" * 8)
    guest = vm.agent()
    guest.hvc(SHARE, RAM)
    vm.load(0)
    guest.load(RAM)
    guest.store(RAM, 0x2222)
    vm.load(0)
    vm.store(0, b"\x33" * 8)
    guest.load(RAM)


def good_share_and_take_back(bench: Bench) -> None:
    """The content stays in both directions; only the host's access comes and goes."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 0x1234_5678)
    vm.load(0)
    guest.hvc(SHARE, RAM)
    vm.load(0)
    vm.store(4, b"\xaa" * 4)
    guest.hvc(UNSHARE, RAM)
    vm.load(0)
    vm.store(0, bytes(8))
    guest.load(RAM)
    guest.hvc(SHARE, RAM)
    vm.load(0)


def good_neighbours(bench: Bench) -> None:
    """Sharing a page shows neither the page before nor the page after."""
    vm = bench.vm()
    guest = vm.agent()
    for page in range(3):
        guest.store(RAM + page * PAGE, page + 1)
    guest.hvc(SHARE, RAM + PAGE)
    for page in range(3):
        vm.load(page * PAGE)
    vm.load(2 * PAGE - 8, 16)
    vm.load(PAGE - 8, 16)


def good_share_code(bench: Bench) -> None:
    """The page that the guest runs in."""
    vm = bench.vm()
    guest = vm.agent()
    assert vm.code is not None
    bench.load(vm.code, 0, 4)
    guest.hvc(SHARE, CODE)
    bench.load(vm.code, 0, 4)
    guest.hvc(UNSHARE, CODE)
    bench.load(vm.code, 0, 4)
    guest.hvc(UNSHARE, CODE)


def good_many(bench: Bench) -> None:
    """Every page of a VM's memory, one after the other."""
    vm = bench.vm(ram_pages=6)
    guest = vm.agent()
    for page in range(6):
        guest.hvc(SHARE, RAM + page * PAGE, show=1)
    vm.load(0, 8)
    vm.load(5 * PAGE, 8)
    for page in reversed(range(6)):
        guest.hvc(UNSHARE, RAM + page * PAGE, show=1)
    vm.load(0, 8)
    vm.load(5 * PAGE, 8)


def bad_twice(bench: Bench) -> None:
    """What is shared cannot be shared, what is private cannot be taken back."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 1)
    guest.hvc(UNSHARE, RAM)
    guest.hvc(SHARE, RAM)
    guest.hvc(SHARE, RAM)
    guest.hvc(UNSHARE, RAM)
    guest.hvc(UNSHARE, RAM)
    guest.hvc(UNSHARE, _NEVER, says="never touched")
    vm.load(_NEVER - RAM)


def bad_arguments(bench: Bench) -> None:
    """Not a page's address, reserved arguments, addresses beyond everything."""
    guest = bench.vm().agent()
    guest.store(RAM, 1)
    for call in (SHARE, UNSHARE):
        for address in (RAM + 8, RAM + PAGE - 1, 1 << 40, 1 << 48, 1 << 52, 1 << 63):
            guest.hvc(call, address)
        guest.hvc(call, RAM, 1)
        guest.hvc(call, RAM, 0, 1)
        guest.hvc(call, RAM, 2, 2)
    guest.hvc(SHARE, RAM, says="as it should be")


def bad_nothing_there(bench: Bench) -> None:
    """An address where the VM has no memory."""
    guest = bench.vm().agent()
    for ipa in (FREE, DEVICE, RAM - PAGE, 0, RAM + 16 * PAGE, (1 << 40) - PAGE):
        guest.hvc(SHARE, ipa)
    for ipa in (FREE, DEVICE, 0):
        guest.hvc(UNSHARE, ipa)


def bad_short_call(bench: Bench) -> None:
    """The 32-bit form of the calls, and SMC for HVC."""
    guest = bench.vm().agent()
    guest.store(RAM, 1)
    guest.hvc(SHARE & ~(1 << 30), RAM)
    guest.hvc(UNSHARE & ~(1 << 30), RAM)
    guest.smc(SHARE, RAM)
    guest.smc(UNSHARE, RAM)
    guest.hvc(SHARE | 1 << 16, RAM, says="SVE hint")
    guest.hvc(SHARE | 1 << 32, RAM, says="bit 32 of the function id")


def bad_not_protected(bench: Bench) -> None:
    """A guest that is not protected has everything shared, and no such calls."""
    vm = bench.vm(protected=False)
    guest = vm.agent()
    guest.store(RAM, 0x77)
    vm.load(0)
    for call in (SHARE, UNSHARE):
        guest.hvc(call, RAM)
    vm.load(0)
    guest.hvc(SHARE, FREE)


def good_two_vcpus(bench: Bench) -> None:
    """What one vCPU shares, the other takes back."""
    vm = bench.vm()
    second = vm.guest(vm.vcpu(1, power_off=True))
    first = vm.agent()
    first.hvc(_CPU_ON, 1, first.agent.info()[Info.SECONDARY], 0, show=1)
    second.start()
    first.store(RAM, 0x55)
    second.hvc(SHARE, RAM)
    vm.load(0)
    first.hvc(UNSHARE, RAM)
    vm.load(0)
    second.load(RAM)
    second.hvc(UNSHARE, RAM)
