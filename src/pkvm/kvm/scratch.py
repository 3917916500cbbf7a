# SPDX-License-Identifier: GPL-2.0-or-later
"""A page for ioctls that take a pointer to where the data is.

Such a pointer (kvm_one_reg.addr, INFO's args[0]) must lie in a mapping made
through the seam. The page is made when it is first needed.
"""

from __future__ import annotations

from pkvm.kvm.kernel import Kernel, Memory

SCRATCH_BYTES = 4096


class Scratch:
    """One page of user memory, made on first use; not for two threads at a time."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._memory: Memory | None = None

    @property
    def memory(self) -> Memory:
        """The page. Raises OSError (ENOMEM) if the kernel has none."""
        if self._memory is None:
            self._memory = self._kernel.mmap(SCRATCH_BYTES)
        return self._memory

    def close(self) -> None:
        """Give the page back. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
