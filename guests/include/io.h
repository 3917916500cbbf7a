/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Device registers.
 *
 * A hypervisor emulates a device from the syndrome of the access alone, and the
 * architecture gives a valid syndrome only for a single register and plain
 * addressing. A compiler may choose a pair or a post-indexed form for a volatile
 * access, so the instruction is written down here.
 */
#ifndef IO_H
#define IO_H

#include <stdint.h>

static inline uint32_t read32(uint64_t address)
{
	uint32_t value;

	asm volatile("ldr %w0, [%1]" : "=r"(value) : "r"(address) : "memory");
	return value;
}

static inline void write32(uint64_t address, uint32_t value)
{
	asm volatile("str %w0, [%1]" : : "r"(value), "r"(address) : "memory");
}

static inline uint64_t read64(uint64_t address)
{
	uint64_t value;

	asm volatile("ldr %0, [%1]" : "=r"(value) : "r"(address) : "memory");
	return value;
}

static inline void write64(uint64_t address, uint64_t value)
{
	asm volatile("str %0, [%1]" : : "r"(value), "r"(address) : "memory");
}

#endif
