/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Enter the payload by the Linux boot protocol (Documentation/arch/arm64/booting.rst):
 * X0 = device tree, X1-X3 = 0, MMU and caches off, interrupts masked. What the
 * firmware knew does not go with it: its stack, its data and all other registers
 * are zero. ERET is the jump that needs no register for its target.
 *
 * X0 = entry, X1 = device tree, X2 = end of the stack.
 */
#include "boot.h"

	.text
	.global enter_payload
enter_payload:
	msr	elr_el1, x0
	mov	x3, #0x3C5		/* EL1h, D, A, I, F masked */
	msr	spsr_el1, x3

	sub	x4, x2, #STACK_BYTES
1:	stp	xzr, xzr, [x4], #16
	cmp	x4, x2
	b.lo	1b
	adr	x4, bss_start
	adr	x2, image_end
2:	cmp	x4, x2
	b.hs	3f
	stp	xzr, xzr, [x4], #16
	b	2b
3:
	msr	vbar_el1, xzr
	msr	tpidr_el1, xzr
	msr	far_el1, xzr
	msr	mair_el1, xzr
	dsb	sy
	ic	iallu			/* the payload came in as data */
	dsb	nsh
	isb

	mov	x0, x1
	mov	x1, #0
	mov	sp, x1
	mov	x2, #0
	mov	x3, #0
	mov	x4, #0
	mov	x5, #0
	mov	x6, #0
	mov	x7, #0
	mov	x8, #0
	mov	x9, #0
	mov	x10, #0
	mov	x11, #0
	mov	x12, #0
	mov	x13, #0
	mov	x14, #0
	mov	x15, #0
	mov	x16, #0
	mov	x17, #0
	mov	x18, #0
	mov	x19, #0
	mov	x20, #0
	mov	x21, #0
	mov	x22, #0
	mov	x23, #0
	mov	x24, #0
	mov	x25, #0
	mov	x26, #0
	mov	x27, #0
	mov	x28, #0
	mov	x29, #0
	mov	x30, #0
	eret
