# SPDX-License-Identifier: GPL-2.0-or-later
"""The numbers of the mailbox and of the agent: guests/include/mailbox.h, agent.h and boot.h.

The headers are the source and say what each number means; a test compares.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

MAILBOX_BASE = 0x0B00_0000
"""IPA of CPU 0's bank."""


class Mailbox(IntEnum):
    """Register offsets in a CPU's bank, bytes, and how many there are of each (MAILBOX_*)."""

    BANK = 0x100
    COMMAND = 0x00
    ARG = 0x08
    ARGS = 6
    STATUS = 0x38
    RESULT = 0x40
    RESULTS = 8
    DATA = 0x80
    DATAS = 16


class Event(IntEnum):
    """What a program announces by writing COMMAND (MAILBOX_EVENT_*)."""

    SHARED = 1
    UNSHARED = 2
    NOTE = 3


class Command(IntEnum):
    """What the agent is told by reading COMMAND (AGENT_COMMAND_*)."""

    NONE = 0
    RUN = 1
    SEALED = 2
    EXECUTE = 3
    BRANCH = 4
    ERET = 5
    BOOT = 6
    INFO = 7


class Status(IntEnum):
    """How a command ended (AGENT_STATUS_*)."""

    DONE = 1
    EXCEPTION = 2
    UNEXPECTED = 3
    BAD_COMMAND = 4


class Info(IntEnum):
    """RESULT registers of Command.INFO (AGENT_INFO_*)."""

    BASE = 0
    END = 1
    SECONDARY = 2
    SCRATCH = 3
    SCRATCH_BYTES = 4
    CODE = 5
    TABLES = 6
    ABI = 7


ABI = 1
"""Info.ABI of the agent that this file describes."""


class Sealed(IntFlag):
    """System registers that Command.SEALED fills and compares (AGENT_SEALED_*)."""

    SP_EL0 = 1
    TPIDR_EL0 = 2
    TPIDR_EL1 = 4
    ELR_EL1 = 8
    FAR_EL1 = 16
    TTBR1_EL1 = 32
    FPSR = 64
    FPCR = 128


class Op(IntEnum):
    """Operations of Command.RUN and, below FUNCTIONS, of Command.SEALED (AGENT_OP_*)."""

    HVC = 0
    SMC = 1
    SVC = 2
    WFI = 3
    WFE = 4
    SPIN = 5
    COUNT = 6
    LDRB = 8
    LDRH = 9
    LDR_W = 10
    LDR_X = 11
    LDRSB_W = 12
    LDRSB_X = 13
    LDRSH_W = 14
    LDRSH_X = 15
    LDRSW = 16
    LDR_XZR = 17
    STRB = 18
    STRH = 19
    STR_W = 20
    STR_X = 21
    STR_XZR = 22
    LDP = 23
    STP = 24
    LDR_POST = 25
    STR_POST = 26
    LDR_Q0 = 27
    STR_Q0 = 28
    LDAR = 29
    STLR = 30
    LDXR = 31
    STXR = 32
    DC_ZVA = 33
    DC_CIVAC = 34
    DC_IVAC = 35
    MEM_FILL = 64
    MEM_CHECK = 65
    MEM_SET = 66
    MEM_CRC = 67
    V_GET = 68
    V_SET = 69
    MMU_ON = 70
    MMU_OFF = 71
    MMU_RUBBISH = 72


class Boot(IntEnum):
    """Words of the entry state that Command.BOOT tells (BOOT_*); X0-X30 are words 0-30."""

    X0 = 0
    SP = 31
    PC = 32
    CURRENT_EL = 33
    DAIF = 34
    SPSEL = 35
    NZCV = 36
    SCTLR_EL1 = 37
    CPACR_EL1 = 38
    VBAR_EL1 = 39
    TCR_EL1 = 40
    TTBR0_EL1 = 41
    TTBR1_EL1 = 42
    SP_EL0 = 43
    ELR_EL1 = 44
    SPSR_EL1 = 45
    ESR_EL1 = 46
    TPIDR_EL0 = 47
    TPIDR_EL1 = 48
    TPIDRRO_EL0 = 49
    CONTEXTIDR_EL1 = 50
    CNTKCTL_EL1 = 51
    CNTV_CTL_EL0 = 52
    PAR_EL1 = 53
    MPIDR_EL1 = 54
    WORDS = 64
