/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Where every program begins: keep the state in which it was entered (boot.h),
 * make a stack and an exception vector, zero the data, call the program.
 *
 * CPUS (1 or 16): how many CPUs the program serves.
 * STACK_GIVEN: use the stack that the entry state offers, if it can be one.
 */
#include "boot.h"

/* From MPIDR_EL1 to this CPU's number. */
.macro number register
	.if	CPUS > 1
	and	\register, \register, #(CPUS - 1)
	.else
	mov	\register, #0
	.endif
.endm

/* Keep the CPU's state in boot_words[number]; afterwards X0 points there and X1 is the number. */
.macro keep_state
	msr	far_el1, x0
	msr	mair_el1, x1
	mrs	x0, mpidr_el1
	number	x0
	adr	x1, boot_words
	add	x0, x1, x0, lsl #BOOT_SHIFT
	stp	x2, x3, [x0, #16]
	mrs	x2, far_el1
	mrs	x3, mair_el1
	stp	x2, x3, [x0]
	stp	x4, x5, [x0, #32]
	stp	x6, x7, [x0, #48]
	stp	x8, x9, [x0, #64]
	stp	x10, x11, [x0, #80]
	stp	x12, x13, [x0, #96]
	stp	x14, x15, [x0, #112]
	stp	x16, x17, [x0, #128]
	stp	x18, x19, [x0, #144]
	stp	x20, x21, [x0, #160]
	stp	x22, x23, [x0, #176]
	stp	x24, x25, [x0, #192]
	stp	x26, x27, [x0, #208]
	stp	x28, x29, [x0, #224]
	mov	x2, sp
	stp	x30, x2, [x0, #240]
	/* Flags first: nothing up to here changes them. */
	mrs	x2, nzcv
	str	x2, [x0, #8 * BOOT_NZCV]
	mrs	x2, CurrentEL
	mrs	x3, daif
	stp	x2, x3, [x0, #8 * BOOT_CURRENT_EL]
	mrs	x2, SPSel
	str	x2, [x0, #8 * BOOT_SPSEL]
	msr	spsel, #1		/* while SP_EL0 is in use its register is undefined */
	mrs	x2, sctlr_el1
	mrs	x3, cpacr_el1
	stp	x2, x3, [x0, #8 * BOOT_SCTLR_EL1]
	mrs	x2, vbar_el1
	mrs	x3, tcr_el1
	stp	x2, x3, [x0, #8 * BOOT_VBAR_EL1]
	mrs	x2, ttbr0_el1
	mrs	x3, ttbr1_el1
	stp	x2, x3, [x0, #8 * BOOT_TTBR0_EL1]
	mrs	x2, sp_el0
	mrs	x3, elr_el1
	stp	x2, x3, [x0, #8 * BOOT_SP_EL0]
	mrs	x2, spsr_el1
	mrs	x3, esr_el1
	stp	x2, x3, [x0, #8 * BOOT_SPSR_EL1]
	mrs	x2, tpidr_el0
	mrs	x3, tpidr_el1
	stp	x2, x3, [x0, #8 * BOOT_TPIDR_EL0]
	mrs	x2, tpidrro_el0
	mrs	x3, contextidr_el1
	stp	x2, x3, [x0, #8 * BOOT_TPIDRRO_EL0]
	mrs	x2, cntkctl_el1
	mrs	x3, cntv_ctl_el0
	stp	x2, x3, [x0, #8 * BOOT_CNTKCTL_EL1]
	mrs	x2, par_el1
	mrs	x3, mpidr_el1
	stp	x2, x3, [x0, #8 * BOOT_PAR_EL1]
	mov	x1, x3
	number	x1
.endm

/* Mask interrupts, set VBAR_EL1: a state that is not as promised can still be told. X2 := stack. */
.macro settle
	msr	daifset, #15
	adr	x2, vectors
	msr	vbar_el1, x2
	msr	tpidr_el1, xzr		/* vectors.S counts in it */
	isb
	/* This CPU's stack. */
	adr	x2, stacks
	add	x3, x1, #1
	add	x2, x2, x3, lsl #STACK_SHIFT
.endm

	.section .text.start, "ax"
	.global _start
_start:
	keep_state
	adr	x2, _start
	str	x2, [x0, #8 * BOOT_PC]
	ldr	x4, [x0, #8 * BOOT_SP]
	settle
#ifdef STACK_GIVEN
	/* Good if aligned, behind the image with room, and less than 1 GiB behind it. */
	tst	x4, #15
	b.ne	1f
	adr	x3, image_end
	add	x3, x3, #STACK_BYTES
	subs	x5, x4, x3
	b.lo	1f
	lsr	x5, x5, #30
	cbnz	x5, 1f
	mov	x2, x4
1:
#endif
	mov	sp, x2
	adr	x2, bss_start
	adr	x3, bss_end
2:	cmp	x2, x3
	b.hs	3f
	stp	xzr, xzr, [x2], #16
	b	2b
3:	mov	x29, #0
	mov	x30, #0
	bl	program

#if CPUS > 1
	.global secondary_start
secondary_start:
	keep_state
	adr	x2, secondary_start
	str	x2, [x0, #8 * BOOT_PC]
	settle
	mov	sp, x2
	mov	x29, #0
	mov	x30, #0
	bl	secondary_program
#endif

	.section .noinit, "aw", %nobits
	.balign 16
boot_words:
	.skip	CPUS << BOOT_SHIFT
	.global stacks
stacks:
	.skip	CPUS << STACK_SHIFT
