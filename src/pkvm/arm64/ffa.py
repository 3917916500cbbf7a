# SPDX-License-Identifier: GPL-2.0-or-later
"""Firmware Framework for Arm A-profile (DEN0077A, 1.0 to 1.2): function ids, errors, registers.

The normal world calls by SMC with the function id in W0. An answer is another
function id in W0: SUCCESS, ERROR with a code in W2, or one that says what comes
next. FFA_VERSION alone answers in W0 with a number. The descriptors of the
memory-management protocol stand in `ffa_memory`.
"""

from __future__ import annotations

from enum import IntEnum

from pkvm.arm64.bits import Field, Layout

W_MASK = 0xFFFF_FFFF
REGISTERS = 18
"""X0 to X17: what an SMC hands over and gets back (SMCCC 1.2)."""
FUNCTION_NUMBERS = range(0x60, 0x100)
"""Numbers of the standard service range that are FF-A's."""


class Function(IntEnum):
    """Function ids; those with a 64-bit form have a member each."""

    FFA_ERROR = 0x8400_0060
    FFA_SUCCESS_32 = 0x8400_0061
    FFA_SUCCESS_64 = 0xC400_0061
    FFA_INTERRUPT = 0x8400_0062
    FFA_VERSION = 0x8400_0063
    FFA_FEATURES = 0x8400_0064
    FFA_RX_RELEASE = 0x8400_0065
    FFA_RXTX_MAP_32 = 0x8400_0066
    FFA_RXTX_MAP_64 = 0xC400_0066
    FFA_RXTX_UNMAP = 0x8400_0067
    FFA_PARTITION_INFO_GET = 0x8400_0068
    FFA_ID_GET = 0x8400_0069
    FFA_MSG_POLL = 0x8400_006A
    FFA_MSG_WAIT = 0x8400_006B
    FFA_YIELD = 0x8400_006C
    FFA_RUN = 0x8400_006D
    FFA_MSG_SEND = 0x8400_006E
    FFA_MSG_SEND_DIRECT_REQ_32 = 0x8400_006F
    FFA_MSG_SEND_DIRECT_REQ_64 = 0xC400_006F
    FFA_MSG_SEND_DIRECT_RESP_32 = 0x8400_0070
    FFA_MSG_SEND_DIRECT_RESP_64 = 0xC400_0070
    FFA_MEM_DONATE_32 = 0x8400_0071
    FFA_MEM_DONATE_64 = 0xC400_0071
    FFA_MEM_LEND_32 = 0x8400_0072
    FFA_MEM_LEND_64 = 0xC400_0072
    FFA_MEM_SHARE_32 = 0x8400_0073
    FFA_MEM_SHARE_64 = 0xC400_0073
    FFA_MEM_RETRIEVE_REQ_32 = 0x8400_0074
    FFA_MEM_RETRIEVE_REQ_64 = 0xC400_0074
    FFA_MEM_RETRIEVE_RESP = 0x8400_0075
    FFA_MEM_RELINQUISH = 0x8400_0076
    FFA_MEM_RECLAIM = 0x8400_0077
    FFA_MEM_OP_PAUSE = 0x8400_0078
    FFA_MEM_OP_RESUME = 0x8400_0079
    FFA_MEM_FRAG_RX = 0x8400_007A
    FFA_MEM_FRAG_TX = 0x8400_007B
    FFA_NORMAL_WORLD_RESUME = 0x8400_007C
    FFA_NOTIFICATION_BITMAP_CREATE = 0x8400_007D
    FFA_NOTIFICATION_BITMAP_DESTROY = 0x8400_007E
    FFA_NOTIFICATION_BIND = 0x8400_007F
    FFA_NOTIFICATION_UNBIND = 0x8400_0080
    FFA_NOTIFICATION_SET = 0x8400_0081
    FFA_NOTIFICATION_GET = 0x8400_0082
    FFA_NOTIFICATION_INFO_GET_32 = 0x8400_0083
    FFA_NOTIFICATION_INFO_GET_64 = 0xC400_0083
    FFA_RX_ACQUIRE = 0x8400_0084
    FFA_SPM_ID_GET = 0x8400_0085
    FFA_MSG_SEND2 = 0x8400_0086
    FFA_CONSOLE_LOG_32 = 0x8400_008A
    FFA_CONSOLE_LOG_64 = 0xC400_008A
    FFA_PARTITION_INFO_GET_REGS = 0xC400_008B
    FFA_MSG_SEND_DIRECT_REQ2 = 0xC400_008D
    FFA_MSG_SEND_DIRECT_RESP2 = 0xC400_008E


class Status(IntEnum):
    """Error codes, in W2 of FFA_ERROR as signed 32-bit numbers."""

    NOT_SUPPORTED = -1
    INVALID_PARAMETERS = -2
    NO_MEMORY = -3
    BUSY = -4
    INTERRUPTED = -5
    DENIED = -6
    RETRY = -7
    ABORTED = -8


VERSION_1_0 = 0x1_0000
VERSION_1_1 = 0x1_0001
VERSION_1_2 = 0x1_0002
VERSION = Layout("FFA_VERSION", Field("mbz", 31, 31), Field("major", 30, 16), Field("minor", 15, 0))
VERSION_NOT_SUPPORTED = Status.NOT_SUPPORTED & W_MASK
"""W0 of FFA_VERSION's answer when the versions do not fit."""

NORMAL_WORLD = 0
"""Endpoint id of the host, which is also the hypervisor's at the secure world's door."""
SPMC = 0x8000
"""Endpoint id of the secure partition manager core."""
COUNT_ONLY = 1
"""PARTITION_INFO_GET's flag in W5: only how many, nothing is written."""
RXTX_SIZE_MASK = 3
"""In W2 of FEATURES' answer about RXTX_MAP: least size and alignment of a buffer, 0 is 4 KiB."""

Registers = tuple[int, ...]
"""X0 to X17, unsigned 64-bit numbers."""


def registers(*values: int) -> Registers:
    """X0 on as given, the others 0. Raises ValueError for more than there are."""
    if len(values) > REGISTERS:
        raise ValueError(f"an SMC has {REGISTERS} registers, not {len(values)}")
    return values + (0,) * (REGISTERS - len(values))


def error(status: Status) -> Registers:
    """The answer FFA_ERROR."""
    return registers(Function.FFA_ERROR, 0, status & W_MASK)


def success(x2: int = 0, x3: int = 0) -> Registers:
    """The answer FFA_SUCCESS with up to two results in X2 and X3."""
    return registers(Function.FFA_SUCCESS_32, 0, x2, x3)


def status_of(answer: Registers) -> Status | None:
    """The error code of an FFA_ERROR, None for any other answer. A code that there is not counts
    as ABORTED."""
    if answer[0] & W_MASK != Function.FFA_ERROR:
        return None
    code = answer[2] & W_MASK
    try:
        return Status(code - (1 << 32) if code >> 31 else code)
    except ValueError:
        return Status.ABORTED


def handle_words(handle: int) -> tuple[int, int]:
    """A memory handle as two 32-bit registers, low one first."""
    return handle & W_MASK, handle >> 32


def handle_of(low: int, high: int) -> int:
    """The memory handle in two 32-bit registers."""
    return (high & W_MASK) << 32 | low & W_MASK


def is_ffa(function: int) -> bool:
    """Whether a 32-bit SMCCC function id is one of FF-A's."""
    return function & 0xBF00_0000 == 0x8400_0000 and function & 0xFFFF in FUNCTION_NUMBERS
