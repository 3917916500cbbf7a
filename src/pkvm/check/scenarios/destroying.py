# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM goes with the last that holds it: descriptors and struct kvm_run, in any order.

And what its pages hold then.
"""

from __future__ import annotations

from pkvm.check.scenarios.bench import PAGE, RAM, Bench, BenchVm, Guest
from pkvm.check.scenarios.handling import change, forced_read, memory, system_call
from pkvm.check.scenarios.sharing import SHARE
from pkvm.uapi.memory import Backing, Change, SystemCall

TITLE = "Destroy in every order"


def _started(bench: Bench, *, protected: bool = True) -> tuple[BenchVm, Guest]:
    vm = bench.vm(protected=protected)
    guest = vm.agent()
    guest.store(RAM, 0x5EC2E7)
    return vm, guest


def good_vcpu_first(bench: Bench) -> None:
    """The vCPU's descriptor, then the VM's."""
    vm, guest = _started(bench)
    bench.call("close", "vCPU", guest.vcpu.close)
    vm.load(0)
    bench.call("close", "VM", vm.vm.close)
    vm.load(0)


def good_vm_first(bench: Bench) -> None:
    """The VM's descriptor first: the VM lives, and runs, by its vCPU's."""
    vm, guest = _started(bench)
    bench.call("close", "VM", vm.vm.close)
    vm.load(0)
    guest.load(RAM)
    guest.store(RAM + PAGE, 2)
    guest.hvc(SHARE, RAM + PAGE)
    vm.load(PAGE)
    bench.call("close", "vCPU", guest.vcpu.close)
    vm.load(0)
    vm.load(PAGE)


def good_not_protected(bench: Bench) -> None:
    """The content of memory that was not protected stays."""
    for vm_first in (True, False):
        vm, guest = _started(bench, protected=False)
        first, second = (vm.vm.close, guest.vcpu.close)
        if not vm_first:
            first, second = second, first
        bench.call("close", "VM" if vm_first else "vCPU", first)
        vm.load(0)
        bench.call("close", "vCPU" if vm_first else "VM", second)
        vm.load(0)


def good_run_page_last(bench: Bench) -> None:
    """struct kvm_run, still mapped, holds the vCPU, and with it the VM."""
    vm, guest = _started(bench)
    size = bench.kvm.vcpu_mmap_size()
    page = bench.kvm.kernel.mmap_vcpu(guest.vcpu.fd, size)
    bench.call("close", "VM", vm.vm.close)
    bench.call("close", "vCPU", guest.vcpu.close)
    vm.load(0)
    bench.call("munmap", "struct kvm_run", page.close)
    vm.load(0)


def good_kvm_first(bench: Bench) -> None:
    """A VM does not need the descriptor by which it was made."""
    fd = bench.kvm.kernel.open("/dev/kvm")
    bench.call("close", "another /dev/kvm", lambda: bench.kvm.kernel.close(fd))
    vm, guest = _started(bench)
    guest.load(RAM)
    vm.load(0)


def good_memory_first(bench: Bench) -> None:
    """The VMM unmaps the guest's memory, then closes everything."""
    vm, guest = _started(bench)
    change(bench, vm.ram, Change.UNMAP, 0, None)
    guest.load(RAM)
    bench.call("close", "vCPU", guest.vcpu.close)
    bench.call("close", "VM", vm.vm.close)
    other = bench.vm(name="other ").agent()
    other.load(RAM)


def good_never_run(bench: Bench) -> None:
    """A VM that never ran: nothing was taken from the host."""
    for protected in (True, False):
        vm = bench.vm(protected=protected, name="" if protected else "other ")
        vm.ram.write(0, b"\x11")
        vcpu = vm.vcpu()
        bench.call("close", "VM", vm.vm.close)
        vm.load(0)
        bench.call("close", "vCPU", vcpu.close)
        vm.load(0)


def good_with_shared_pages(bench: Bench) -> None:
    """Shared pages are wiped like the private ones."""
    vm, guest = _started(bench)
    guest.hvc(SHARE, RAM)
    guest.store(RAM + PAGE, 0x5EC2E7)
    vm.load(0)
    bench.call("close", "vCPU", guest.vcpu.close)
    bench.call("close", "VM", vm.vm.close)
    vm.load(0)
    vm.load(PAGE)


def good_every_kind_of_page(bench: Bench) -> None:
    """After the end: private, shared, untouched, taken by force and written again, the code."""
    vm, guest = _started(bench)
    assert vm.code is not None
    guest.store(RAM + PAGE, 0x5EC2E7)
    guest.hvc(SHARE, RAM + PAGE)
    vm.store(2 * PAGE, b"\x22" * 8)
    guest.store(RAM + 3 * PAGE, 0x5EC2E7)
    forced_read(bench, vm.ram, 3 * PAGE)
    vm.store(3 * PAGE, b"\x33" * 8)
    vm.store(4 * PAGE, b"\x44" * 8)
    guest.load(RAM + 4 * PAGE)
    bench.call("close", "vCPU", guest.vcpu.close)
    bench.call("close", "VM", vm.vm.close)
    for page in range(6):
        vm.load(page * PAGE)
    bench.load(vm.code, 0, 8)
    vm.store(0, b"\x55" * 8)
    vm.load(0)
    system_call(bench, vm.ram, SystemCall.WRITE)
    system_call(bench, vm.ram, SystemCall.READ)


def good_every_backing(bench: Bench) -> None:
    """Pages of an object that outlives the VM, and of one that does not."""
    for backing in (Backing.MEMFD, Backing.TMPFS, Backing.SHARED, Backing.FILE_PRIVATE):
        ram = memory(bench, "ram", 4, backing)
        assert ram is not None
        ram.write(PAGE, b"\x11")
        vm = bench.vm(ram=ram, name=backing.name)
        guest = vm.agent()
        guest.store(RAM, 0x5EC2E7)
        guest.vcpu.close()
        vm.vm.close()
        vm.load(0)
        vm.load(PAGE)


def good_again_and_again(bench: Bench) -> None:
    """The same memory in one VM after the other: each finds it wiped."""
    ram = memory(bench, "ram", 4)
    assert ram is not None
    for number in range(3):
        vm = bench.vm(ram=ram, name=f"{number} ")
        guest = vm.agent()
        guest.load(RAM)
        guest.store(RAM, number + 1)
        guest.vcpu.close()
        vm.vm.close()
        vm.load(0)
        vm.store(PAGE, bytes([number]))


def bad_use_after_close(bench: Bench) -> None:
    """Calls on descriptors that were closed."""
    vm, guest = _started(bench)
    guest.vcpu.close()
    bench.call("KVM_RUN", "closed vCPU", guest.vcpu.run)
    bench.call("KVM_GET_MP_STATE", "closed vCPU", lambda: guest.vcpu.mp_state)
    vm.vm.close()
    bench.call("KVM_CREATE_VCPU", "closed VM", lambda: vm.vm.create_vcpu(1))
    bench.call("close", "VM again", lambda: bench.kvm.kernel.close(vm.vm.fd))
