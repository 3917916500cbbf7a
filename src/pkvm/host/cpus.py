# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's CPU hotplug: PSCI by SMC, as if nobody stood between it and the firmware.

Only power is real here. What the kernel does on a CPU is done by whoever calls
it; but each CPU has its own way to memory, and whatever stage-2 came up with it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from pkvm.arm64 import ffa, psci
from pkvm.arm64.psci import Affinity, Function
from pkvm.host.ports import Bus

Smc = Callable[[tuple[int, ...], int, int], tuple[int, ...]]
"""SMC: (X0-X17, immediate, number of the host CPU) -> X0-X17, none if it does not return."""

_ERRNOS = {
    psci.NOT_SUPPORTED: errno.EOPNOTSUPP,
    psci.INVALID_PARAMS: errno.EINVAL,
    psci.INVALID_ADDRESS: errno.EINVAL,
    psci.DENIED: errno.EPERM,
    psci.ALREADY_ON: errno.EBUSY,
    psci.ON_PENDING: errno.EAGAIN,
}


class HostCpus:
    """The CPUs by number, which is their affinity too; `buses` are their ways to memory."""

    def __init__(self, smc: Smc, buses: Sequence[Bus]) -> None:
        self._smc = smc
        self.buses = tuple(buses)

    def call(self, function: int, *arguments: int, cpu: int = 0) -> int:
        """A PSCI call on a CPU: X0, 0 if it does not return. Raises OSError for an error code."""
        answer = self._smc(ffa.registers(function, *arguments), 0, cpu)
        result = answer[0] if answer else 0
        if result >> 63:
            number = _ERRNOS.get(result, errno.EIO)
            raise OSError(
                number,
                f"the firmware answered {result - (1 << 64)} to PSCI call "
                f"{psci.function_name(function)}",
            )
        return result

    def up(self, cpu: int, entry_pa: int, context: int = 0) -> None:
        """CPU_ON: `cpu` begins at `entry_pa` with `context` in X0. Raises OSError: EINVAL for a CPU
        that there is not, EBUSY for one that runs or starts."""
        self.call(Function.CPU_ON_64, cpu, entry_pa, context)

    def down(self, cpu: int) -> None:
        """CPU_OFF, on the CPU itself. Raises OSError: EPERM for the last one."""
        self.call(Function.CPU_OFF, cpu=cpu)

    def state(self, cpu: int) -> Affinity:
        """Whether a CPU is on. Raises OSError: EINVAL for one that there is not."""
        return Affinity(self.call(Function.AFFINITY_INFO_64, cpu, 0))
