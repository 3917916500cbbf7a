/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Stage 1 for tests: an identity map, or rubbish. Arm ARM D8.3. */
#include "board.h"
#include "boot.h"
#include "internal.h"
#include "text.h"

#define ENTRIES 512
#define BLOCK_1G_SHIFT 30
#define BLOCK_2M_SHIFT 21

#define DESC_BLOCK 1
#define DESC_TABLE 3
#define ATTR_NORMAL (0 << 2)	/* index in MAIR_EL1 */
#define ATTR_DEVICE (1 << 2)
#define SH_INNER (3 << 8)
#define AF (1 << 10)
#define PXN (UINT64_C(1) << 53)
#define UXN (UINT64_C(1) << 54)

#define MAIR (UINT64_C(0x04) << 8 | 0x44) /* 1: Device-nGnRE, 0: Normal non-cacheable */
/* T0SZ = 25 (39 bits), EPD1, 4 KiB granule, walks inner shareable and non-cacheable, 40-bit IPA. */
#define TCR (25 | 3 << 12 | 1 << 23 | UINT64_C(2) << 32)

#define SCTLR_M (1 << 0)

/* Devices: 0x0800_0000 to the RAM's base. */
#define DEVICES (UINT64_C(0x08000000) >> BLOCK_2M_SHIFT)

static struct {
	uint64_t level1[ENTRIES];
	uint64_t first_gigabyte[ENTRIES];
} tables __attribute__((aligned(PAGE_BYTES)));

static void make_identity(void)
{
	for (uint64_t i = 0; i < ENTRIES; i++) {
		uint64_t kind = i < DEVICES ? ATTR_NORMAL : ATTR_DEVICE | PXN | UXN;

		tables.first_gigabyte[i] = i << BLOCK_2M_SHIFT | kind | SH_INNER | AF | DESC_BLOCK;
		tables.level1[i] = i << BLOCK_1G_SHIFT | ATTR_NORMAL | SH_INNER | AF | DESC_BLOCK;
	}
	tables.level1[0] = (uint64_t)tables.first_gigabyte | DESC_TABLE;
}

uint64_t mmu_tables(void)
{
	return (uint64_t)&tables;
}

uint64_t mmu_on(uint64_t ttbr0)
{
	uint64_t sctlr;

	if (ttbr0 == 0) {
		make_identity();
		ttbr0 = mmu_tables();
	}
	asm volatile("dsb sy\n\t"
		     "msr mair_el1, %1\n\t"
		     "msr tcr_el1, %2\n\t"
		     "msr ttbr0_el1, %3\n\t"
		     "isb\n\t"
		     "tlbi vmalle1\n\t"
		     "dsb nsh\n\t"
		     "isb\n\t"
		     "mrs %0, sctlr_el1\n\t"
		     "orr %0, %0, %4\n\t"
		     "msr sctlr_el1, %0\n\t"
		     "isb"
		     : "=&r"(sctlr)
		     : "r"(MAIR), "r"(TCR), "r"(ttbr0), "I"(SCTLR_M)
		     : "memory");
	return ttbr0;
}

void mmu_off(void)
{
	uint64_t sctlr;

	asm volatile("mrs %0, sctlr_el1\n\t"
		     "bic %0, %0, %1\n\t"
		     "msr sctlr_el1, %0\n\t"
		     "isb\n\t"
		     "tlbi vmalle1\n\t"
		     "dsb nsh\n\t"
		     "isb"
		     : "=&r"(sctlr)
		     : "I"(SCTLR_M)
		     : "memory");
}

void mmu_rubbish(uint64_t seed, uint64_t all)
{
	make_identity();
	for (uint64_t i = 0; i < ENTRIES; i++) {
		bool needed = i == BOARD_MAILBOX >> BLOCK_1G_SHIFT ||
			      i == (uint64_t)image_start >> BLOCK_1G_SHIFT;

		if (all || !needed)
			tables.level1[i] = pattern(seed, i);
	}
	asm volatile("dsb sy\n\t"
		     "tlbi vmalle1\n\t"
		     "dsb nsh\n\t"
		     "isb"
		     :
		     :
		     : "memory");
}
