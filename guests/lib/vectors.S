/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The exception vector of programs that expect no exception: tell what happened
 * and ask for a reset.
 *
 * The stack may be what is broken, so the report has one of its own, and nothing
 * returns from here. TPIDR_EL1, which these programs use for nothing else, counts
 * from the 0 that start.S put there: an exception inside the report must not
 * become another report.
 */
#include "boot.h"

	.text
	.balign 2048
	.global vectors
vectors:
	.set	offset, 0
	.rept	16
	.balign 128
	mov	x4, #offset
	b	exception
	.set	offset, offset + 128
	.endr

exception:
	mrs	x5, tpidr_el1
	add	x5, x5, #1
	msr	tpidr_el1, x5
	msr	spsel, #1
	adr	x6, exception_stack_end
	mov	sp, x6
	mov	x0, x4
	mrs	x1, esr_el1
	mrs	x2, elr_el1
	mrs	x3, far_el1
	mov	x4, x5
	bl	report_exception

	.section .noinit, "aw", %nobits
	.balign 16
	.skip	2048
exception_stack_end:
