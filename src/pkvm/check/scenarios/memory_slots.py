# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory slots: what may be made, changed and deleted, before the guest first runs and after."""

from __future__ import annotations

from pkvm.check.scenarios.bench import FREE, FREE_SLOT, PAGE, RAM, RAM_SLOT, Bench, BenchVm, place
from pkvm.uapi.kvm import MEMORY_REGION, Ioctl, MemFlag

TITLE = "memory slots and their rules over a VM's life"
_LAST = 32766
_LOG = int(MemFlag.LOG_DIRTY_PAGES)
_READONLY = int(MemFlag.READONLY)


def good_before_run_protected(bench: Bench) -> None:
    """A protected VM's slots come, move and go before it runs."""
    _before_run(bench, bench.vm())


def good_before_run(bench: Bench) -> None:
    """Likewise those of a non-protected VM."""
    _before_run(bench, bench.vm(protected=False))


def _before_run(bench: Bench, vm: BenchVm) -> None:
    more = bench.memory("more", 8)
    vm.slot(FREE_SLOT, FREE, more)
    vm.slot(FREE_SLOT, FREE, more, says="again")
    vm.slot(FREE_SLOT, FREE + 64 * PAGE, more, says="moved")
    vm.slot(3, FREE, more, size=4 * PAGE, says="same memory twice")
    vm.slot(4, FREE + 4 * PAGE, more, offset=4 * PAGE, says="next to it")
    vm.slot(_LAST, FREE + 128 * PAGE, more, says="the last number")
    vm.slot(FREE_SLOT, 0, None, says="deleted")
    vm.slot(FREE_SLOT, FREE + 64 * PAGE, more, says="made again")
    vm.slot(5, 0, more, says="at 0")
    vm.slot(RAM_SLOT, 0, None, says="deleted")
    vm.slot(RAM_SLOT, RAM, vm.ram, says="made again")


def bad_before_run_protected(bench: Bench) -> None:
    """What no VM may ask for, and what a protected one may not."""
    _refused(bench, bench.vm())


def bad_before_run(bench: Bench) -> None:
    """What no VM may ask for; read-only slots and dirty logs are there."""
    _refused(bench, bench.vm(protected=False))


def _refused(bench: Bench, vm: BenchVm) -> None:
    more = bench.memory("more", 8)
    vm.slot(2, FREE, more)
    vm.slot(3, FREE, more, says="overlap")
    vm.slot(3, FREE + 7 * PAGE, more, says="overlap")
    vm.slot(3, FREE - PAGE, more, size=2 * PAGE, says="overlap")
    vm.slot(2, FREE, more, size=4 * PAGE, says="smaller")
    vm.slot(2, FREE, more, offset=PAGE, says="other memory, smaller")
    vm.slot(2, FREE, more, flags=_READONLY, says="READONLY now")
    vm.slot(2, FREE, more, flags=_LOG, says="LOG_DIRTY now")
    vm.slot(2, FREE, more, says="no LOG_DIRTY")
    vm.slot(3, FREE + 64 * PAGE, more, flags=_READONLY, says="READONLY")
    vm.slot(4, FREE + 80 * PAGE, more, flags=_LOG, says="LOG_DIRTY")
    vm.slot(5, FREE + 96 * PAGE, more, flags=_LOG | _READONLY, says="both")
    vm.slot(6, FREE + 112 * PAGE, more, flags=4, says="GUEST_MEMFD")
    vm.slot(6, FREE + 112 * PAGE, more, flags=8, says="unknown flag")
    vm.slot(6, FREE + 112 * PAGE, more, flags=1 << 31, says="unknown flag")
    vm.slot(6, 0, None, says="deleted, never made")
    vm.slot(6, FREE + 112 * PAGE, more, size=PAGE + 1, says="unaligned size")
    vm.slot(6, FREE + 112 * PAGE + 8, more, says="unaligned address")
    vm.slot(6, FREE + 112 * PAGE, more, offset=8, size=PAGE, says="unaligned user address")
    vm.slot(_LAST + 1, FREE + 112 * PAGE, more, says="number too large")
    vm.slot(1 << 16, FREE + 112 * PAGE, more, says="second address space")
    vm.slot(1 << 31, FREE + 112 * PAGE, more, says="number too large")


def bad_addresses_protected(bench: Bench) -> None:
    """Ends of the address spaces, on a protected VM."""
    _addresses(bench, bench.vm())


def bad_addresses(bench: Bench) -> None:
    """Likewise on a non-protected VM."""
    _addresses(bench, bench.vm(protected=False))


def _addresses(bench: Bench, vm: BenchVm) -> None:
    more = bench.memory("more", 8)
    slot = 16
    for ipa in (1 << 44, (1 << 44) - PAGE, (1 << 40) - PAGE, 1 << 48, 1 << 52, (1 << 64) - PAGE):
        slot += 1
        vm.slot(slot, ipa, more, size=PAGE)
    vm.slot(10, (1 << 44) - PAGE, more, size=2 * PAGE)
    _region(bench, vm, 11, FREE, 0x1000, 0, "user address 0")
    _region(bench, vm, 12, FREE + PAGE, 0x1000, 0xFFFF_0000_0000_0000, "the kernel's address")
    _region(bench, vm, 12, FREE + PAGE, 0x1000, (1 << 48) - PAGE, "the last user page")
    _region(bench, vm, 13, FREE + PAGE, 0x1000, 1 << 56, "tagged user address")
    _region(bench, vm, 14, FREE + (1 << 32), 1 << 43, more.address, "8 TiB")
    _region(bench, vm, 15, FREE, (1 << 64) - PAGE, more.address, "everything")


def _region(
    bench: Bench, vm: BenchVm, slot: int, ipa: int, size: int, user: int, says: str
) -> None:
    region = bytearray(MEMORY_REGION.pack(slot, 0, ipa, size, user))
    request = Ioctl.SET_USER_MEMORY_REGION
    words = f"{says}: slot {slot} at {place(ipa)} size {size:#x}"
    bench.ioctl("KVM_SET_USER_MEMORY_REGION", words, vm.vm.fd, request, region)


def good_after_run_protected(bench: Bench) -> None:
    """A protected VM that has run gets more memory; what it has stays."""
    _after_run(bench, bench.vm())


def good_after_run(bench: Bench) -> None:
    """A non-protected VM's slots go on changing."""
    _after_run(bench, bench.vm(protected=False))


def _after_run(bench: Bench, vm: BenchVm) -> None:
    more = bench.memory("more", 8)
    more.write(0, b"first")
    more.write(4 * PAGE, b"fifth")
    guest = vm.agent()
    guest.load(FREE)
    guest.answer(7)
    guest.resume(show=2)
    vm.slot(2, FREE, more, says="after the run")
    guest.load(FREE)
    guest.store(FREE + PAGE, 0x1234)
    vm.slot(2, FREE, more, says="again")
    vm.slot(2, FREE, more, flags=_LOG, says="LOG_DIRTY now")
    vm.slot(3, FREE + 64 * PAGE, more, size=PAGE, flags=_LOG, says="LOG_DIRTY")
    vm.slot(4, FREE + 80 * PAGE, more, size=PAGE, flags=_READONLY, says="READONLY")
    vm.slot(5, FREE + 4 * PAGE, more, says="overlap")
    vm.slot(2, FREE + 32 * PAGE, more, says="moved")
    guest.load(FREE)
    if bench.error is not None:
        guest.answer(9)
        guest.resume(show=2)
    guest.load(FREE + 32 * PAGE + 4 * PAGE)
    if bench.error is not None:
        guest.answer(10)
        guest.resume(show=2)
    vm.slot(2, 0, None, says="deleted")
    guest.load(FREE + PAGE, 2)
    if bench.error is not None:
        guest.answer(11)
        guest.resume(show=2)
    vm.slot(RAM_SLOT, 0, None, says="deleted")
    bench.load(more, PAGE, 8)


def good_readonly(bench: Bench) -> None:
    """A read-only slot of a non-protected VM: loads are loads, stores come out as MMIO."""
    vm = bench.vm(protected=False)
    rom = bench.memory("rom", 2)
    rom.write(8, b"read-only")
    vm.slot(2, FREE, rom, flags=_READONLY)
    guest = vm.agent()
    guest.load(FREE + 8)
    guest.store(FREE + 8, 0x55AA, 2)
    guest.resume(show=0)
    guest.store(FREE + PAGE, 0x66, 1)
    guest.resume(show=0)
    guest.load(FREE + 8, 4)
    bench.load(rom, 8, 8)
    vm.slot(2, FREE, rom, says="not READONLY")
    vm.slot(2, 0, None, says="deleted")
    vm.slot(2, FREE, rom, says="writable")
    guest.store(FREE + 8, 0x55AA, 2)
    bench.load(rom, 8, 8)


def good_gaps_protected(bench: Bench) -> None:
    """A protected guest at the edges of its memory."""
    _gaps(bench, bench.vm(ram_pages=2))


def good_gaps(bench: Bench) -> None:
    """A non-protected guest at the edges of its memory."""
    _gaps(bench, bench.vm(ram_pages=2, protected=False))


def _gaps(bench: Bench, vm: BenchVm) -> None:
    guest = vm.agent()
    guest.store(RAM + 2 * PAGE - 8, 0x1111_2222_3333_4444)
    guest.load(RAM + 2 * PAGE - 4, 4)
    for ipa in (RAM - 8, RAM + 2 * PAGE):
        guest.load(ipa)
        guest.answer(0xAB)
        guest.resume(show=2)
    guest.load(RAM + 2 * PAGE - 8)


def bad_region2_and_dirty_log(bench: Bench) -> None:
    """Requests about slots that a protected VM has no use for."""
    for protected in (True, False):
        vm = bench.vm(protected=protected)
        kind = "protected" if protected else "non-protected"
        log = bytearray((0).to_bytes(8, "little") + vm.ram.address.to_bytes(8, "little"))
        bench.ioctl("KVM_GET_DIRTY_LOG", kind, vm.vm.fd, Ioctl.GET_DIRTY_LOG, log)
        log = bytearray((9).to_bytes(8, "little") + vm.ram.address.to_bytes(8, "little"))
        bench.ioctl("KVM_GET_DIRTY_LOG", f"{kind}, no slot", vm.vm.fd, Ioctl.GET_DIRTY_LOG, log)
        tss = 0x1000
        bench.ioctl("KVM_SET_TSS_ADDR", f"{kind}, an x86 request", vm.vm.fd, 0xAE47, tss)
        bench.ioctl("unknown request", kind, vm.vm.fd, 0xAEFF)
        bench.ioctl(
            "KVM_SET_USER_MEMORY_REGION",
            f"{kind}, unreadable",
            vm.vm.fd,
            Ioctl.SET_USER_MEMORY_REGION,
            0x1000,
        )
