# SPDX-License-Identifier: GPL-2.0-or-later
"""`Accomplice`: a VM of the attacker's, whose guest does what the attacker says."""

from __future__ import annotations

from pkvm import guests
from pkvm.arm64.stage2 import PAGE_SHIFT, PAGE_SIZE
from pkvm.guests.agent import Agent
from pkvm.kvm import Kvm

RAM_IPA = 0x4000_0000
RAM_BYTES = 2 << 20
FREE_GFN = (RAM_IPA + 2 * RAM_BYTES) >> PAGE_SHIFT
"""A guest frame where nothing is mapped."""
_WORD = 8


class Accomplice:
    """The agent in a VM that is not protected, on one vCPU, started. Raises OSError."""

    def __init__(self, kvm: Kvm) -> None:
        self.vm = kvm.create_vm()
        self.ram = kvm.mmap(RAM_BYTES)
        self.ram.write(0, guests.image("agent"))
        self.vm.set_user_memory_region(0, RAM_IPA, self.ram)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.init()
        self.vcpu.set_reg("pc", RAM_IPA)
        self.agent = Agent(self.vcpu)
        self.agent.start()

    def look(self, gfn: int) -> bytes:
        """What its guest finds in a page. Raises AgentExitError if nothing is there."""
        ipa = gfn << PAGE_SHIFT
        words = (self.agent.load(ipa + at) for at in range(0, PAGE_SIZE, _WORD))
        return b"".join(word.to_bytes(_WORD, "little") for word in words)
