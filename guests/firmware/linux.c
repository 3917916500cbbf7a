/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What Linux asks of whoever starts it (Documentation/arch/arm64/booting.rst):
 * the header of an `Image`, and the initramfs. A kernel that is not where it must
 * be, or that has pages which this CPU does not know, stops without a word.
 */
#include "board.h"
#include "console.h"
#include "firmware.h"

#define IMAGE_TEXT_OFFSET 8
#define IMAGE_SIZE 16
#define IMAGE_FLAGS 24
#define IMAGE_MAGIC_AT 56
#define IMAGE_HEADER_BYTES 64
#define IMAGE_MAGIC 0x644D5241 /* "ARM\x64" */
#define IMAGE_ALIGNMENT (UINT64_C(2) << 20)

#define FLAG_BIG_ENDIAN (1 << 0)
#define FLAGS_PAGE_SHIFT 1
#define FLAGS_PAGE_MASK 3

/* Whether the CPU has pages of the kind in an Image's flags (0: unspecified, 1: 4, 2: 16, 3: 64 KiB):
 * TGran4, TGran16 and TGran64 of ID_AA64MMFR0_EL1. */
static bool has_pages(uint64_t mmfr0, unsigned kind)
{
	switch (kind) {
	case 1:
		return (mmfr0 >> 28 & 15) != 15;
	case 2:
		return (mmfr0 >> 20 & 15) != 0;
	case 3:
		return (mmfr0 >> 24 & 15) != 15;
	}
	return true;
}

void check_image(struct range payload, uint64_t entry)
{
	const uint8_t *image = (const uint8_t *)payload.base;
	uint64_t text_offset, size, flags, mmfr0;

	if (payload.bytes < IMAGE_HEADER_BYTES || payload.base % 8 ||
	    *(const uint32_t *)(image + IMAGE_MAGIC_AT) != IMAGE_MAGIC)
		return;
	text_offset = *(const uint64_t *)(image + IMAGE_TEXT_OFFSET);
	size = *(const uint64_t *)(image + IMAGE_SIZE);
	flags = *(const uint64_t *)(image + IMAGE_FLAGS);
	asm("mrs %0, id_aa64mmfr0_el1" : "=r"(mmfr0));

	put("  it is a kernel Image\n");
	if (entry != payload.base)
		fail("payload", "a kernel that is not entered at its first byte");
	/* Without a size, from before Linux 3.17, the header says nothing more. */
	if (size == 0)
		return;
	if (size > payload.bytes)
		fail("payload", "a kernel that needs more memory than /config says");
	if ((payload.base - text_offset) % IMAGE_ALIGNMENT)
		fail("payload", "a kernel that is not text_offset above a multiple of 2 MiB");
	if (flags & FLAG_BIG_ENDIAN)
		fail("payload", "a big-endian kernel");
	if (!has_pages(mmfr0, flags >> FLAGS_PAGE_SHIFT & FLAGS_PAGE_MASK))
		fail("payload", "a kernel with pages of a size that this CPU does not have");
}

/* One end of the initramfs; 32 or 64 bits, as the kernel takes it. */
static enum fdt_status initrd_cell(const struct fdt *tree, uint32_t chosen, const char *name,
				   uint64_t *value)
{
	uint32_t half = 0;
	enum fdt_status status = fdt_u64(tree, chosen, name, value);

	if (status == FDT_VALUE) {
		status = fdt_u32(tree, chosen, name, &half);
		*value = half;
	}
	return status;
}

struct range find_initrd(const struct fdt *tree, struct range memory, struct range payload)
{
	struct range none = {0, 0}, initrd, blob = {(uint64_t)tree->blob, tree->bytes};
	uint64_t start = 0, end = 0;
	uint32_t chosen;
	enum fdt_status first, last, status = fdt_node(tree, "/chosen", &chosen);

	if (status == FDT_MISSING)
		return none;
	if (status != FDT_OK)
		fail("device tree: /chosen", fdt_words(status));
	first = initrd_cell(tree, chosen, "linux,initrd-start", &start);
	last = initrd_cell(tree, chosen, "linux,initrd-end", &end);
	if (first == FDT_MISSING && last == FDT_MISSING)
		return none;
	if (first != FDT_OK || last != FDT_OK)
		fail("device tree: /chosen: initramfs", fdt_words(first != FDT_OK ? first : last));

	initrd = (struct range){start, end - start};
	if (start >= end || !is_within(initrd, memory))
		fail("device tree: /chosen: initramfs", "not in /memory");
	if (overlap(initrd, payload) || overlap(initrd, blob))
		fail("device tree: /chosen: initramfs", "overlaps the payload or the device tree");
	put("  initramfs ");
	put_hex(start);
	put(", ");
	put_decimal(end - start);
	put(" bytes\n");
	return initrd;
}
