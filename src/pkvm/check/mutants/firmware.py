# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2s without one guard of the doors to firmware.

Each opens a way round EL2 that is known from the field or that the guard is there for.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

from pkvm.arm64 import registers
from pkvm.arm64.psci import Function
from pkvm.check.mutants.install import Install, replaced
from pkvm.hyp import ffa, ffa_memory, host_smc, hypervisor
from pkvm.hyp.ffa_buffers import FfaBuffers
from pkvm.hyp.ffa_memory import SecureSharing
from pkvm.hyp.host_psci import PsciRelay, Wish
from pkvm.machine.host_cpus import HostCpu


def _nothing(self: SecureSharing, ranges: ffa_memory.Ranges, *, lend: bool = False) -> None:
    """A transition that is left out."""


def _no_ownership(stack: ExitStack) -> None:
    for name in ("give", "take_back", "check_given"):
        stack.enter_context(patch.object(SecureSharing, name, _nothing))


def _hosts_entry(stack: ExitStack) -> None:
    """Firmware gets the entry that the host asked for."""

    def cpu_on(self: PsciRelay, cpu: HostCpu, mpidr: int, pc: int, x0: int) -> int:
        result = self._firmware(cpu, Function.CPU_ON_64, mpidr, pc, x0)
        return result or 0

    stack.enter_context(patch.object(PsciRelay, "_cpu_on", cpu_on))


def _hosts_resume_entry(stack: ExitStack) -> None:
    """Likewise for the entry at which a CPU wakes."""

    def suspend(
        self: PsciRelay, cpu: HostCpu, wish: Wish, function: int, *state: int
    ) -> int | None:
        return self._firmware(cpu, function, *state, wish.pc, wish.x0)

    stack.enter_context(patch.object(PsciRelay, "_suspend", suspend))


def _any_buffers(stack: ExitStack) -> None:
    """The host's word for where its buffers are is enough."""
    for name in ("_share", "_unshare"):
        stack.enter_context(patch.object(FfaBuffers, name, lambda self, pa: None))


def _message_read_twice(stack: ExitStack) -> None:
    """What the secure world gets is read from the host's buffer once more."""

    def send(self: FfaBuffers, data: bytes) -> None:
        self._memory.write(self.tx, self._memory.read(self.host[0], len(data)))

    stack.enter_context(patch.object(FfaBuffers, "send", send))


def _later_fragments_pass(stack: ExitStack) -> None:
    """Only a first fragment's ranges are looked at."""
    stack.enter_context(patch.object(ffa, "more_ranges", lambda data: []))


MUTANTS: dict[str, Install] = {
    "the host's SMCs trap": replaced(
        hypervisor, "HOST_HCR", registers.HOST_HCR & ~registers.hcr("TSC")
    ),
    "a function id is canonical": replaced(host_smc, "is_canonical", lambda x0, immediate: True),
    "a CPU that starts enters EL2 first": _hosts_entry,
    "a CPU that wakes enters EL2 first": _hosts_resume_entry,
    "the host's buffers are the host's": _any_buffers,
    "a message is read once": _message_read_twice,
    "the secure world is given what the host owns": _no_ownership,
    "every fragment is looked at": _later_fragments_pass,
    "memory is given by calls that EL2 follows": replaced(ffa, "REFUSED", frozenset()),
}
"""By the guard that is missing."""
