# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CREATE_VM's machine types, and what each kind of VM says it can do."""

from __future__ import annotations

from pkvm.check.scenarios.bench import Bench
from pkvm.kvm import Kvm, Vm
from pkvm.uapi.kvm import TYPE_PROTECTED, Cap

TITLE = "VM types and capabilities"


def good_types(bench: Bench) -> None:
    """Every type that there is: with and without protection, and an IPA size, which is ignored."""
    for ipa_bits in (0, 32, 36, 40, 48, 52, 31, 255):
        for kind in (0, TYPE_PROTECTED):
            _create(bench, kind | ipa_bits)


def bad_types(bench: Bench) -> None:
    """Bits that mean nothing."""
    for bit in (8, 9, 16, 29, 30, 32, 63):
        for kind in (0, TYPE_PROTECTED):
            _create(bench, kind | 1 << bit)


def _create(bench: Bench, kind: int) -> None:
    vm = bench.call("KVM_CREATE_VM", hex(kind), lambda: bench.kvm.create_vm(kind))
    if vm is not None:
        vm.close()


def good_api(bench: Bench) -> None:
    """The API's version and kvm_run's size."""
    bench.call("KVM_GET_API_VERSION", "", bench.kvm.api_version)
    bench.call("KVM_GET_VCPU_MMAP_SIZE", "", bench.kvm.vcpu_mmap_size)


def good_capabilities(bench: Bench) -> None:
    """What the system, a non-protected VM and a protected one say of each capability."""
    plain = bench.kvm.create_vm(0)
    bench.adopt(plain)
    protected = bench.kvm.create_vm(TYPE_PROTECTED)
    bench.adopt(protected)
    for cap in Cap:
        _capability(bench, cap, (bench.kvm, plain, protected))


def _capability(bench: Bench, cap: Cap, files: tuple[Kvm, Vm, Vm]) -> None:
    bench.call(
        "KVM_CHECK_EXTENSION",
        cap.name,
        lambda: "system {}, VM {}, protected VM {}".format(
            *(file.check_extension(cap) for file in files)
        ),
    )
