/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent's commands. pkvm.guests.protocol mirrors the numbers; a test
 * compares the two files.
 *
 * A CPU reads COMMAND of its mailbox bank (mailbox.h), then only those ARG and
 * DATA registers that the command has, carries it out, writes those RESULT
 * registers that are not 0, writes STATUS, and reads COMMAND again.
 *
 * "Operations" run between two known points of the agent with X0, X1, ... as
 * given in DATA0, DATA1, ... and the rest of X0-X29 zero; an exception that one
 * raises is caught and told. Interrupts stay masked unless an operation unmasks
 * them.
 */
#ifndef AGENT_H
#define AGENT_H

#define AGENT_ABI 1

/* Commands. Of RUN to ERET: ARG0 = how many DATA registers are given, at most 16. */
#define AGENT_COMMAND_NONE 0	/* nothing now; no STATUS is written */
#define AGENT_COMMAND_RUN 1	/* ARG1 = operation -> X0-X7 */
#define AGENT_COMMAND_SEALED 2	/* RUN with every other register filled, see below */
#define AGENT_COMMAND_EXECUTE 3	/* ARG1-ARG4 = instruction words (0: NOP) -> X0-X7 */
#define AGENT_COMMAND_BRANCH 4	/* ARG1 = address, called with BLR -> X0-X7 */
#define AGENT_COMMAND_ERET 5	/* ARG1-ARG4 = instruction words, ARG5 = SPSR_EL1: ERET to them;
				 * SVC #0 follows them, in the instruction set that SPSR asks for */
#define AGENT_COMMAND_BOOT 6	/* ARG0 = n -> words n to n+7 of the entry state (boot.h) */
#define AGENT_COMMAND_INFO 7	/* -> AGENT_INFO_* */

/*
 * SEALED: ARG1 = operation, ARG2 = seed. X(ARG0)-X29, V0-V31 and AGENT_SEALED_* hold words of the
 * seed's pattern (text.h) while the operation runs. RESULT0 = mask of X registers and RESULT1 = of
 * V registers that hold something else afterwards, RESULT2 = mask of AGENT_SEALED_*,
 * RESULT3-RESULT6 = X0-X3, RESULT7 = content of the first changed X register that was filled.
 */
#define AGENT_SEALED_SP_EL0 (1 << 0)
#define AGENT_SEALED_TPIDR_EL0 (1 << 1)
#define AGENT_SEALED_TPIDR_EL1 (1 << 2)
#define AGENT_SEALED_ELR_EL1 (1 << 3)
#define AGENT_SEALED_FAR_EL1 (1 << 4)
#define AGENT_SEALED_TTBR1_EL1 (1 << 5)
#define AGENT_SEALED_FPSR (1 << 6)
#define AGENT_SEALED_FPCR (1 << 7)

/* STATUS. */
#define AGENT_STATUS_DONE 1
#define AGENT_STATUS_EXCEPTION 2	/* RESULT0-7 = ESR, FAR, ELR, SPSR, vector offset, X0-X2 */
#define AGENT_STATUS_UNEXPECTED 3	/* the same, of the agent itself */
#define AGENT_STATUS_BAD_COMMAND 4	/* unknown command or operation, or a bad argument */

/* RESULT registers of INFO. */
#define AGENT_INFO_BASE 0	/* the image's first byte */
#define AGENT_INFO_END 1	/* end of its memory, with zeroed data and stacks */
#define AGENT_INFO_SECONDARY 2	/* entry point for PSCI CPU_ON */
#define AGENT_INFO_SCRATCH 3	/* memory for the test's use, aligned to a page */
#define AGENT_INFO_SCRATCH_BYTES 4
#define AGENT_INFO_CODE 5	/* where this CPU's instruction words are put */
#define AGENT_INFO_TABLES 6	/* the stage-1 tables of MMU_ON: level 1, then level 2 */
#define AGENT_INFO_ABI 7	/* AGENT_ABI */

/* Operations of one instruction; the access is to [X0], a value is X1 (and X2). */
#define AGENT_OP_HVC 0	/* HVC #0 with X0-X15 given */
#define AGENT_OP_SMC 1
#define AGENT_OP_SVC 2
#define AGENT_OP_WFI 3
#define AGENT_OP_WFE 4
#define AGENT_OP_SPIN 5	/* branch to itself, for ever */
#define AGENT_OP_COUNT 6	/* count X0 down to 0 */
#define AGENT_OP_LDRB 8
#define AGENT_OP_LDRH 9
#define AGENT_OP_LDR_W 10
#define AGENT_OP_LDR_X 11
#define AGENT_OP_LDRSB_W 12
#define AGENT_OP_LDRSB_X 13
#define AGENT_OP_LDRSH_W 14
#define AGENT_OP_LDRSH_X 15
#define AGENT_OP_LDRSW 16
#define AGENT_OP_LDR_XZR 17
#define AGENT_OP_STRB 18
#define AGENT_OP_STRH 19
#define AGENT_OP_STR_W 20
#define AGENT_OP_STR_X 21
#define AGENT_OP_STR_XZR 22
/* Accesses without a valid syndrome (ISV = 0). For write-back QEMU 5.0, the CPU engine, has one. */
#define AGENT_OP_LDP 23
#define AGENT_OP_STP 24
#define AGENT_OP_LDR_POST 25	/* ldr x1, [x0], #8 */
#define AGENT_OP_STR_POST 26
#define AGENT_OP_LDR_Q0 27
#define AGENT_OP_STR_Q0 28
/* Ordered and exclusive accesses, cache maintenance by address. */
#define AGENT_OP_LDAR 29
#define AGENT_OP_STLR 30
#define AGENT_OP_LDXR 31
#define AGENT_OP_STXR 32	/* status in W2 */
#define AGENT_OP_DC_ZVA 33
#define AGENT_OP_DC_CIVAC 34
#define AGENT_OP_DC_IVAC 35

/* Operations that are functions: X0-X7 are arguments and, where one says so, results. */
#define AGENT_OP_FUNCTIONS 64
#define AGENT_OP_MEM_FILL 64	/* [X0, X0 + X1) := pattern of seed X2, in words of 8 bytes */
#define AGENT_OP_MEM_CHECK 65	/* the same arguments -> words that differ, address of the first */
#define AGENT_OP_MEM_SET 66	/* [X0, X0 + X1) := the 64-bit word X2 */
#define AGENT_OP_MEM_CRC 67	/* [X0, X0 + X1) -> CRC-32 */
#define AGENT_OP_V_GET 68	/* V<X0> -> low half, high half */
#define AGENT_OP_V_SET 69	/* V<X0> := X1 (low half), X2 (high half) */
/*
 * MMU on with TTBR0_EL1 = X0, 39-bit addresses, 4 KiB granule, level-1 table. X0 = 0: the agent's
 * own tables, which map every address below 512 GiB to itself: devices as Device-nGnRE and not
 * executable, all else as Normal non-cacheable (so that no cache maintenance is due on the way in
 * or out), no access for EL0. -> the TTBR0_EL1 used.
 */
#define AGENT_OP_MMU_ON 70
#define AGENT_OP_MMU_OFF 71
/*
 * Fill the level-1 table with the pattern of seed X0 as descriptors. X1 = 0: except for the
 * entries by which the agent and the mailbox are mapped; 1: all, which the agent does not survive
 * with its MMU on.
 */
#define AGENT_OP_MMU_RUBBISH 72

#endif
