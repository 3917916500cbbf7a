# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CAP_ARM_PROTECTED_VM as Android has it: SET_FW_IPA, INFO and SET_FFA (facts §2.2).

The VM is protected from its creation. Firmware is optional: a VM without starts
where the VMM says. EL2 puts it into the memory that the guest touches there.
"""

from __future__ import annotations

import errno

from pkvm.host import protected
from pkvm.host.vm import Vm
from pkvm.hyp.abi import HostCall
from pkvm.uapi.dialects import ANDROID

NO_FIRMWARE = (1 << 64) - 1
_SET_FW_IPA = ANDROID.flags["SET_FW_IPA"]
_INFO = ANDROID.flags["INFO"]
_SET_FFA = ANDROID.flags["SET_FFA"]


def enable_cap(vm: Vm, flags: int, args: tuple[int, int, int, int]) -> None:
    """KVM_ENABLE_CAP(ARM_PROTECTED_VM). Raises EINVAL for a VM that is not protected, for
    arguments that must be zero and are not, for other flags and for guest FF-A (this host's
    KVM has none), EFAULT from INFO, else as `set_firmware_address`."""
    if not vm.protected:
        raise OSError(errno.EINVAL, "the VM is not protected: KVM_CREATE_VM with bit 31 makes one")
    if any(args[1:]):
        raise OSError(errno.EINVAL, "reserved arguments of KVM_CAP_ARM_PROTECTED_VM must be zero")
    if flags == _SET_FW_IPA:
        set_firmware_address(vm, args[0])
    elif flags == _INFO:
        protected.info(vm, args[0], 0)
    elif flags == _SET_FFA:
        raise OSError(errno.EINVAL, "no guest of this host can have FF-A")
    else:
        known = ", ".join(f"{name} is {number}" for name, number in ANDROID.flags.items())
        raise OSError(errno.EINVAL, f"flags {flags:#x}: {known}")


def set_firmware_address(vm: Vm, ipa: int) -> None:
    """SET_FW_IPA: the guest firmware is to appear at `ipa`; all ones: nowhere. Raises EINVAL on a
    host without guest firmware, EBUSY once the VM is at EL2."""
    if not vm.host.firmware_size:
        raise OSError(errno.EINVAL, "the host's boot firmware left no guest firmware")
    if vm.at_el2:
        raise OSError(errno.EBUSY, "a vCPU has run: the firmware's address is set before")
    vm.firmware_ipa = None if ipa == NO_FIRMWARE else ipa


def name_to_el2(vm: Vm, ipa: int) -> None:
    """Have EL2 put the firmware at `ipa`. Raises EFAULT where the VM has no memory, or what EL2
    answers."""
    nbytes = vm.host.firmware_size
    slot = vm.slots.at(ipa)
    if slot is None or ipa + nbytes > slot.end:
        raise OSError(errno.EFAULT, f"the firmware, [{ipa:#x}, +{nbytes:#x}), is not in one slot")
    vm.host.el2.call(HostCall.SET_FIRMWARE, vm.handle, ipa, nbytes)
