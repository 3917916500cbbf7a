/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent's operations, how one is run, and the exception vector that ends it.
 */
#include "agent.h"
#include "internal.h"

	.text

/* One 16-byte slot for each number in agent.h; the gaps are zero, which is undefined. */
.macro operation number, instruction, more
	.org	operations + \number * 16
	\instruction
	.ifnb	\more
	\more
	.endif
	ret
.endm

	.balign 16
	.global operations
operations:
	operation AGENT_OP_HVC, "hvc #0"
	operation AGENT_OP_SMC, "smc #0"
	operation AGENT_OP_SVC, "svc #0"
	operation AGENT_OP_WFI, "wfi"
	operation AGENT_OP_WFE, "wfe"
	operation AGENT_OP_SPIN, "b ."
	operation AGENT_OP_COUNT, "subs x0, x0, #1", "b.ne . - 4"
	operation AGENT_OP_LDRB, "ldrb w1, [x0]"
	operation AGENT_OP_LDRH, "ldrh w1, [x0]"
	operation AGENT_OP_LDR_W, "ldr w1, [x0]"
	operation AGENT_OP_LDR_X, "ldr x1, [x0]"
	operation AGENT_OP_LDRSB_W, "ldrsb w1, [x0]"
	operation AGENT_OP_LDRSB_X, "ldrsb x1, [x0]"
	operation AGENT_OP_LDRSH_W, "ldrsh w1, [x0]"
	operation AGENT_OP_LDRSH_X, "ldrsh x1, [x0]"
	operation AGENT_OP_LDRSW, "ldrsw x1, [x0]"
	operation AGENT_OP_LDR_XZR, "ldr xzr, [x0]"
	operation AGENT_OP_STRB, "strb w1, [x0]"
	operation AGENT_OP_STRH, "strh w1, [x0]"
	operation AGENT_OP_STR_W, "str w1, [x0]"
	operation AGENT_OP_STR_X, "str x1, [x0]"
	operation AGENT_OP_STR_XZR, "str xzr, [x0]"
	operation AGENT_OP_LDP, "ldp x1, x2, [x0]"
	operation AGENT_OP_STP, "stp x1, x2, [x0]"
	operation AGENT_OP_LDR_POST, "ldr x1, [x0], #8"
	operation AGENT_OP_STR_POST, "str x1, [x0], #8"
	operation AGENT_OP_LDR_Q0, "ldr q0, [x0]"
	operation AGENT_OP_STR_Q0, "str q0, [x0]"
	operation AGENT_OP_LDAR, "ldar x1, [x0]"
	operation AGENT_OP_STLR, "stlr x1, [x0]"
	operation AGENT_OP_LDXR, "ldxr x1, [x0]"
	operation AGENT_OP_STXR, "stxr w2, x1, [x0]"
	operation AGENT_OP_DC_ZVA, "dc zva, x0"
	operation AGENT_OP_DC_CIVAC, "dc civac, x0"
	operation AGENT_OP_DC_IVAC, "dc ivac, x0"
	.global operations_end
operations_end:

	.global run_operation
run_operation:
	add	x9, x0, #CPU_SAVED
	stp	x19, x20, [x9]
	stp	x21, x22, [x9, #16]
	stp	x23, x24, [x9, #32]
	stp	x25, x26, [x9, #48]
	stp	x27, x28, [x9, #64]
	mov	x10, sp
	stp	x29, x30, [x9, #80]
	str	x10, [x9, #96]
	msr	tpidrro_el0, x0
	mov	x10, #1
	str	x10, [x0, #CPU_BUSY]
	mov	x30, x1
	cmn	x2, #1			/* CALL is all ones; the flags are not touched until b.eq */
	b.eq	1f
	msr	elr_el1, x1
	msr	spsr_el1, x2
1:
	ldp	x28, x29, [x0, #CPU_X + 224]
	ldp	x26, x27, [x0, #CPU_X + 208]
	ldp	x24, x25, [x0, #CPU_X + 192]
	ldp	x22, x23, [x0, #CPU_X + 176]
	ldp	x20, x21, [x0, #CPU_X + 160]
	ldp	x18, x19, [x0, #CPU_X + 144]
	ldp	x16, x17, [x0, #CPU_X + 128]
	ldp	x14, x15, [x0, #CPU_X + 112]
	ldp	x12, x13, [x0, #CPU_X + 96]
	ldp	x10, x11, [x0, #CPU_X + 80]
	ldp	x8, x9, [x0, #CPU_X + 64]
	ldp	x6, x7, [x0, #CPU_X + 48]
	ldp	x4, x5, [x0, #CPU_X + 32]
	ldp	x2, x3, [x0, #CPU_X + 16]
	b.eq	2f
	mov	x30, #0
	ldp	x0, x1, [x0, #CPU_X]
	eret
2:	ldp	x0, x1, [x0, #CPU_X]
	blr	x30

	/* Only X30 is free here; its own value means nothing after the return. */
	mrs	x30, tpidrro_el0
	stp	x0, x1, [x30, #CPU_X]
	mov	x0, x30
	mov	x30, #0
	mov	x1, #RETURNED

/* X0 = the CPU, whose x[0] and x[1] are kept already; X1 = what to return. */
keep_and_finish:
	stp	x2, x3, [x0, #CPU_X + 16]
	stp	x4, x5, [x0, #CPU_X + 32]
	stp	x6, x7, [x0, #CPU_X + 48]
	stp	x8, x9, [x0, #CPU_X + 64]
	stp	x10, x11, [x0, #CPU_X + 80]
	stp	x12, x13, [x0, #CPU_X + 96]
	stp	x14, x15, [x0, #CPU_X + 112]
	stp	x16, x17, [x0, #CPU_X + 128]
	stp	x18, x19, [x0, #CPU_X + 144]
	stp	x20, x21, [x0, #CPU_X + 160]
	stp	x22, x23, [x0, #CPU_X + 176]
	stp	x24, x25, [x0, #CPU_X + 192]
	stp	x26, x27, [x0, #CPU_X + 208]
	stp	x28, x29, [x0, #CPU_X + 224]
	str	x30, [x0, #CPU_X + 240]

	/* The operation may have left any stack pointer and mask behind. */
	msr	daifset, #15
	msr	spsel, #1
	ldr	x2, [x0, #CPU_BUSY]
	cbz	x2, 1f
	str	xzr, [x0, #CPU_BUSY]
	add	x9, x0, #CPU_SAVED
	ldr	x10, [x9, #96]
	mov	sp, x10
	ldp	x19, x20, [x9]
	ldp	x21, x22, [x9, #16]
	ldp	x23, x24, [x9, #32]
	ldp	x25, x26, [x9, #48]
	ldp	x27, x28, [x9, #64]
	ldp	x29, x30, [x9, #80]
	mov	x0, x1
	ret
1:	ldr	x2, [x0, #CPU_STACK]
	mov	sp, x2
	b	unexpected

	/*
	 * Every register belongs to the operation. SP_EL1 does not count (the
	 * agent's own is in struct cpu), so X0 can wait there.
	 */
	.balign 2048
	.global vectors
vectors:
	.set	offset, 0
	.rept	16
	.balign 128
	mov	sp, x0
	mrs	x0, tpidrro_el0
	str	x1, [x0, #CPU_X + 8]
	mov	x1, #offset
	b	exception
	.set	offset, offset + 128
	.endr

exception:
	str	x1, [x0, #CPU_ESR + 32]
	mov	x1, sp
	str	x1, [x0, #CPU_X]
	mrs	x1, esr_el1
	str	x1, [x0, #CPU_ESR]
	mrs	x1, far_el1
	str	x1, [x0, #CPU_ESR + 8]
	mrs	x1, elr_el1
	str	x1, [x0, #CPU_ESR + 16]
	mrs	x1, spsr_el1
	str	x1, [x0, #CPU_ESR + 24]
	mov	x1, #EXCEPTION
	b	keep_and_finish

	.global store_v
store_v:
	stp	q0, q1, [x0, #0]
	stp	q2, q3, [x0, #32]
	stp	q4, q5, [x0, #64]
	stp	q6, q7, [x0, #96]
	stp	q8, q9, [x0, #128]
	stp	q10, q11, [x0, #160]
	stp	q12, q13, [x0, #192]
	stp	q14, q15, [x0, #224]
	stp	q16, q17, [x0, #256]
	stp	q18, q19, [x0, #288]
	stp	q20, q21, [x0, #320]
	stp	q22, q23, [x0, #352]
	stp	q24, q25, [x0, #384]
	stp	q26, q27, [x0, #416]
	stp	q28, q29, [x0, #448]
	stp	q30, q31, [x0, #480]
	ret

	.global load_v
load_v:
	ldp	q0, q1, [x0, #0]
	ldp	q2, q3, [x0, #32]
	ldp	q4, q5, [x0, #64]
	ldp	q6, q7, [x0, #96]
	ldp	q8, q9, [x0, #128]
	ldp	q10, q11, [x0, #160]
	ldp	q12, q13, [x0, #192]
	ldp	q14, q15, [x0, #224]
	ldp	q16, q17, [x0, #256]
	ldp	q18, q19, [x0, #288]
	ldp	q20, q21, [x0, #320]
	ldp	q22, q23, [x0, #352]
	ldp	q24, q25, [x0, #384]
	ldp	q26, q27, [x0, #416]
	ldp	q28, q29, [x0, #448]
	ldp	q30, q31, [x0, #480]
	ret
