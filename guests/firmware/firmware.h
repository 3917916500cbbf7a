/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef FIRMWARE_H
#define FIRMWARE_H

#include <stdbool.h>
#include <stdint.h>

#include "fdt.h"

struct range {
	uint64_t base, bytes;
};

static inline bool overlap(struct range a, struct range b)
{
	return a.base < b.base + b.bytes && b.base < a.base + a.bytes;
}

/* Whether all of `part` lies in `whole`. */
static inline bool is_within(struct range part, struct range whole)
{
	return part.base >= whole.base && part.bytes <= whole.bytes &&
	       part.base - whole.base <= whole.bytes - part.bytes;
}

/* Say why, and ask for a reset; main.c. */
_Noreturn void fail(const char *what, const char *why);

/* If the payload has the header of a Linux Image: fail unless it can run as it stands. linux.c. */
void check_image(struct range payload, uint64_t entry);

/* The initramfs that /chosen names; no bytes if it names none. Fails for one that is not in memory
 * of its own. linux.c. */
struct range find_initrd(const struct fdt *tree, struct range memory, struct range payload);

/* Leave for `entry` with X0 = `tree`; enter.S. */
_Noreturn void enter_payload(uint64_t entry, uint64_t tree, uint64_t stack_end);

#endif
