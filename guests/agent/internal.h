/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the agent's files share. */
#ifndef INTERNAL_H
#define INTERNAL_H

/* Offsets in struct cpu, for operations.S. */
#define CPU_X 0x000
#define CPU_SAVED 0x100
#define CPU_ESR 0x170
#define CPU_BUSY 0x198
#define CPU_STACK 0x1A0

#define RETURNED 0
#define EXCEPTION 1

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "boot.h"

/* One CPU; TPIDRRO_EL0 points to it while an operation runs. */
struct cpu {
	uint64_t x[32];		/* X0-X30 of the operation, before and after */
	uint64_t saved[14];	/* the agent's own X19-X30 and SP meanwhile */
	uint64_t esr, far, elr, spsr, vector;
	uint64_t busy;		/* an operation runs: an exception is its result */
	uint64_t stack;		/* top, where an unexpected exception starts over */
	uint64_t mailbox;
	const uint64_t *boot;
	uint32_t code[8] __attribute__((aligned(64)));
};

_Static_assert(offsetof(struct cpu, saved) == CPU_SAVED, "");
_Static_assert(offsetof(struct cpu, esr) == CPU_ESR, "");
_Static_assert(offsetof(struct cpu, busy) == CPU_BUSY, "");
_Static_assert(offsetof(struct cpu, stack) == CPU_STACK, "");

/*
 * Run what is at `target` with cpu->x: called with BLR, or, if `spsr` is not
 * CALL, entered by ERET with that SPSR. RETURNED or EXCEPTION; cpu->x holds the
 * registers afterwards.
 */
#define CALL (~UINT64_C(0))
uint64_t run_operation(struct cpu *cpu, uint64_t target, uint64_t spsr);

/* An exception outside of an operation; operations.S comes here on a fresh stack. */
_Noreturn void unexpected(struct cpu *cpu);

/* One-instruction operations, 16 bytes each, by number. */
extern char operations[];
extern char operations_end[];

/* All SIMD registers to and from 512 bytes. Nothing else here touches them. */
void store_v(uint64_t *to);
void load_v(const uint64_t *from);

struct two {
	uint64_t x0, x1;
};

/* Stage 1; AGENT_OP_MMU_* in agent.h. */
uint64_t mmu_on(uint64_t ttbr0);
void mmu_off(void);
void mmu_rubbish(uint64_t seed, uint64_t all);
uint64_t mmu_tables(void);

#endif
#endif
