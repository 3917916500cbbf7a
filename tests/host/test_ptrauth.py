# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_ARM_VCPU_PTRAUTH_*: offered where the CPU has it, both or none, and then the guest has it."""

from __future__ import annotations

import errno

import pytest

from pkvm.kvm import Vcpu
from pkvm.system import System
from pkvm.uapi.kvm import Cap, VcpuFeature

ADDRESS, GENERIC = VcpuFeature.PTRAUTH_ADDRESS, VcpuFeature.PTRAUTH_GENERIC


def refused(vcpu: Vcpu, *features: VcpuFeature) -> int:
    with pytest.raises(OSError, match=r"feature|PTRAUTH") as caught:
        vcpu.init(features=features)
    return caught.value.errno or 0


def test_a_cpu_that_has_it() -> None:
    with (
        System(memory=64 << 20, cpu_model="max", dialect="upstream") as system,
        system.open() as kvm,
        kvm.create_vm(1 << 31) as vm,
        vm.create_vcpu(0) as vcpu,
    ):
        assert vm.check_extension(Cap.ARM_PTRAUTH_ADDRESS) == 1
        assert vm.check_extension(Cap.ARM_PTRAUTH_GENERIC) == 1
        assert refused(vcpu, ADDRESS) == errno.EINVAL
        assert refused(vcpu, GENERIC) == errno.EINVAL
        assert refused(vcpu, ADDRESS, GENERIC, VcpuFeature.SVE) == errno.EINVAL
        vcpu.init(features=(ADDRESS, GENERIC))
        assert refused(vcpu) == errno.EINVAL


def test_a_cpu_that_has_it_not() -> None:
    with (
        System(memory=64 << 20) as system,
        system.open() as kvm,
        kvm.create_vm() as vm,
        vm.create_vcpu(0) as vcpu,
    ):
        assert kvm.check_extension(Cap.ARM_PTRAUTH_ADDRESS) == 0
        assert refused(vcpu, ADDRESS, GENERIC) == errno.EINVAL
