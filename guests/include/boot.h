/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The state in which a CPU entered this program, kept by start.S before
 * anything is changed: an array of 64-bit words for each CPU.
 *
 * FAR_EL1 and MAIR_EL1 are not in it: start.S needs two places to put X0 and X1
 * while it looks for memory to save the rest in.
 */
#ifndef BOOT_H
#define BOOT_H

#define BOOT_X0 0 /* X0-X30 are words 0-30 */
#define BOOT_SP 31 /* the one in use */
#define BOOT_PC 32
#define BOOT_CURRENT_EL 33
#define BOOT_DAIF 34
#define BOOT_SPSEL 35
#define BOOT_NZCV 36
#define BOOT_SCTLR_EL1 37
#define BOOT_CPACR_EL1 38
#define BOOT_VBAR_EL1 39
#define BOOT_TCR_EL1 40
#define BOOT_TTBR0_EL1 41
#define BOOT_TTBR1_EL1 42
#define BOOT_SP_EL0 43
#define BOOT_ELR_EL1 44
#define BOOT_SPSR_EL1 45
#define BOOT_ESR_EL1 46
#define BOOT_TPIDR_EL0 47
#define BOOT_TPIDR_EL1 48
#define BOOT_TPIDRRO_EL0 49
#define BOOT_CONTEXTIDR_EL1 50
#define BOOT_CNTKCTL_EL1 51
#define BOOT_CNTV_CTL_EL0 52
#define BOOT_PAR_EL1 53
#define BOOT_MPIDR_EL1 54
#define BOOT_WORDS 64
#define BOOT_SHIFT 9 /* log2 of a CPU's bytes */

#ifndef __ASSEMBLER__
#include <stdint.h>

/* What a program provides. `boot` is this CPU's array, `cpu` its MPIDR_EL1.Aff0. */
_Noreturn void program(const uint64_t *boot, unsigned cpu);
_Noreturn void secondary_program(const uint64_t *boot, unsigned cpu);

/* Where a further CPU enters by PSCI CPU_ON; start.S. */
extern char secondary_start[];

/* The image in memory: its first byte, the end of what was loaded, the end with its zeroed data. */
extern char image_start[];
extern char image_loaded_end[];
extern char image_end[];

/* STACK_BYTES for each CPU. */
extern char stacks[];
#endif

/* Bytes of a CPU's stack. */
#define STACK_SHIFT 13
#define STACK_BYTES (1 << STACK_SHIFT)

#endif
