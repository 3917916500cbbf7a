# SPDX-License-Identifier: GPL-2.0-or-later
"""How much there is of everything: VMs, locked memory, descriptors."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from pkvm.check.scenarios.bench import PAGE, RAM, Bench
from pkvm.check.scenarios.handling import change, memory
from pkvm.check.scenarios.sharing import SHARE
from pkvm.kvm import Vm
from pkvm.uapi.kvm import TYPE_PROTECTED
from pkvm.uapi.memory import Backing, Change

TITLE = "Limits"
_MOST = 255
"""VMs that EL2 has handles for."""
_SPARE = 64
"""More than a guest of these scenarios needs to start."""


def _fill(bench: Bench, vms: list[Vm], kinds: tuple[int, ...]) -> None:
    """Make VMs of these types in turn, until there are no more."""
    while len(vms) <= _MOST:
        try:
            vms.append(bench.kvm.create_vm(kinds[len(vms) % len(kinds)]))
        except OSError:
            return
        bench.adopt(vms[-1])


def _most(bench: Bench, kinds: tuple[int, ...], says: str) -> None:
    vms: list[Vm] = []

    def fill() -> int:
        _fill(bench, vms, kinds)
        return len(vms)

    bench.call("KVM_CREATE_VM", f"{says}, until it fails", fill)
    create = bench.kvm.create_vm
    for kind in (0, TYPE_PROTECTED):
        bench.call("KVM_CREATE_VM", f"{kind:#x}, one more", partial(create, kind))
    vms.pop().close()
    made = bench.call(
        "KVM_CREATE_VM", "after one was closed", lambda: bench.kvm.create_vm(kinds[0])
    )
    bench.call("KVM_CREATE_VM", "and one more", lambda: bench.kvm.create_vm(kinds[0]))
    if made is not None:
        bench.call("KVM_CREATE_VCPU", "in the last VM", lambda: made.create_vcpu(0))


def bad_protected_vms(bench: Bench) -> None:
    """Protected VMs."""
    _most(bench, (TYPE_PROTECTED,), "protected")


def bad_vms(bench: Bench) -> None:
    """VMs that are not protected."""
    _most(bench, (0,), "not protected")


def bad_both(bench: Bench) -> None:
    """Both kinds count together."""
    _most(bench, (0, TYPE_PROTECTED), "both kinds in turn")


def bad_memlock(bench: Bench) -> None:
    """RLIMIT_MEMLOCK: each page that a protected guest touches counts."""
    vm = bench.vm()
    guest = vm.agent()
    guest.load(RAM)
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        guest.load(RAM)
        guest.load(RAM + PAGE)
        guest.resume()
        vm.load(PAGE)
        _limit(bench, stack, _SPARE * PAGE)
        guest.resume()
        vm.load(PAGE)
        guest.load(RAM + 2 * PAGE)


def bad_memlock_share(bench: Bench) -> None:
    """A page that is touched by sharing it counts likewise, and so it does while it is shared."""
    vm = bench.vm()
    guest = vm.agent()
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        guest.hvc(SHARE, RAM)
        guest.resume()
        vm.load(0)
        _limit(bench, stack, _SPARE * PAGE)
        guest.resume()
        vm.load(0)
        _limit(bench, stack, 0)
        guest.hvc(SHARE, RAM + PAGE)


def good_memlock_not_protected(bench: Bench) -> None:
    """Memory of a guest that is not protected is not locked."""
    vm = bench.vm(protected=False)
    guest = vm.agent()
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        guest.store(RAM, 1)
        guest.load(RAM + PAGE)
        vm.load(0)


def bad_memlock_start(bench: Bench) -> None:
    """Without any locked memory a protected guest does not start."""
    vm = bench.vm()
    guest = vm.guest(vm.vcpu())
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        guest.start()
        guest.start()
        _limit(bench, stack, _SPARE * PAGE)
        guest.start()


def good_memlock_given_back(bench: Bench) -> None:
    """What a VM has locked is free again when it goes."""
    with ExitStack() as stack:
        _limit(bench, stack, _SPARE * PAGE)
        for number in range(8):
            vm = bench.vm(name=f"{number} ")
            guest = vm.guest(vm.vcpu())
            guest.start()
            guest.vcpu.close()
            vm.vm.close()


def bad_memlock_order(bench: Bench) -> None:
    """Which error comes first: no right to lock, or memory that cannot be pinned."""
    ram = memory(bench, "ram", 4, Backing.SECRET)
    if ram is None:
        return
    vm = bench.vm(ram=ram)
    guest = vm.agent()
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        guest.load(RAM)
        guest.resume()
        _limit(bench, stack, _SPARE * PAGE)
        guest.resume()


def bad_memlock_reclaimed(bench: Bench) -> None:
    """A page that was taken by force counts until the VM goes."""
    vm = bench.vm()
    guest = vm.agent()
    guest.store(RAM, 1)
    with ExitStack() as stack:
        _limit(bench, stack, 0)
        vm.ram.forced_read(0, 1)
        guest.load(RAM + PAGE)
        change(bench, vm.ram, Change.UNMAP, 0, PAGE)
        guest.resume()


def _limit(bench: Bench, stack: ExitStack, limit: int) -> None:
    """Set the limit until the scenario's end."""
    set_limit = bench.kvm.kernel.limit_memlock
    bench.call("setrlimit", f"RLIMIT_MEMLOCK {limit // PAGE} pages", lambda: set_limit(limit))
    stack.callback(set_limit, None)
