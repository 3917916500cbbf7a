# SPDX-License-Identifier: GPL-2.0-or-later
"""What the attacks by way of the secure world share."""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64 import ffa
from pkvm.arm64.ffa import Function, Registers
from pkvm.arm64.ffa_memory import Constituent, write_transaction
from pkvm.arm64.stage2 import PAGE_SIZE
from pkvm.check.attacks.scene import Scene
from pkvm.host.ffa import FfaCallError, FfaDriver
from pkvm.machine.secure import PARTITIONS
from pkvm.machine.secure_partition import Command

PARTITION = min(PARTITIONS)
_WORD = 8

Message = Callable[..., tuple[int, ...]]
"""A direct message: X3 on of what the partition is told, and of its answer."""


def read_by_partition(driver: FfaDriver, handle: int, offset: int) -> bytes:
    """A page of what `handle` stands for, from byte `offset` on, as the partition reads it. Raises
    FfaCallError."""
    return _read(lambda *words: driver.message(PARTITION, *words), handle, offset)


def give_past_el2(scene: Scene, upper: int, map_buffers: int, give: int) -> bytes:
    """Tell the secure world of buffers of the host's own, and then of the guest's page, by calls
    that EL2 lets through if it is careless; the page as the partition reads it.

    `upper` goes into X0's upper half, `map_buffers` and `give` are functions. Raises
    FfaCallError, OSError.
    """
    tx = scene.new_pages(2)

    def smc(function: int, *arguments: int) -> Registers:
        answer = scene.smc(upper | function, *arguments)
        status = ffa.status_of(answer)
        if status is not None:
            raise FfaCallError(Function(function).name, status)
        return answer

    scene.smc(Function.FFA_VERSION, ffa.VERSION_1_2)
    try:
        smc(Function.FFA_RXTX_UNMAP)
    except (FfaCallError, OSError):
        pass  # nobody had told of any
    smc(map_buffers, tx, tx + PAGE_SIZE, 1)
    pages = [Constituent(scene.secret.pa, 1)]
    data = write_transaction(ffa.VERSION_1_2, pages, receivers=[PARTITION])
    scene.host_bus.write(tx, data)
    answer = smc(give, len(data), len(data))

    def message(*words: int) -> tuple[int, ...]:
        return smc(Function.FFA_MSG_SEND_DIRECT_REQ_64, PARTITION, 0, *words)[3:8]

    return _read(message, ffa.handle_of(answer[2], answer[3]), 0)


def _read(message: Message, handle: int, offset: int) -> bytes:
    message(Command.RETRIEVE, handle)
    words = (message(Command.READ, handle, offset + at)[1] for at in range(0, PAGE_SIZE, _WORD))
    return b"".join(word.to_bytes(_WORD, "little") for word in words)
