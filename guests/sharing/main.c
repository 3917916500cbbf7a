/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The demonstration's payload: share one page with the VMM, talk through it,
 * take it back, and show that the pages around it stayed the guest's own.
 * mailbox.h has the protocol. Without protection it runs the same, but for the
 * sharing: there the VMM sees everything anyway.
 */
#include "board.h"
#include "boot.h"
#include "console.h"
#include "io.h"
#include "mailbox.h"
#include "psci.h"
#include "smccc.h"
#include "text.h"

#define WORDS (PAGE_BYTES / 8)
#define HALF (PAGE_BYTES / 2)
#define PRIVATE_PAGES 4

static const char greeting[] = "Hello, host. I can keep a secret, and this is not one.";

/* The shared page between private ones, as neighbours in one table. */
static struct {
	uint64_t before[PRIVATE_PAGES][WORDS];
	uint64_t shared[WORDS];
	uint64_t after[PRIVATE_PAGES][WORDS];
} pages __attribute__((aligned(PAGE_BYTES)));

static _Noreturn void give_up(const char *what, int64_t code)
{
	put("sharing: ");
	put(what);
	put(" failed: ");
	put(smccc_words(code));
	put(" (");
	put_signed(code);
	put("); resetting\n");
	psci_system_reset();
}

static void announce(uint64_t event, uint64_t page, uint64_t crc, uint64_t is_shared)
{
	write64(BOARD_MAILBOX + MAILBOX_ARG, page);
	write64(BOARD_MAILBOX + MAILBOX_ARG + 8, PAGE_BYTES);
	write64(BOARD_MAILBOX + MAILBOX_ARG + 16, crc);
	write64(BOARD_MAILBOX + MAILBOX_ARG + 24, is_shared);
	/* The page's content is there before the VMM is told. */
	asm volatile("dsb sy" : : : "memory");
	write64(BOARD_MAILBOX + MAILBOX_COMMAND, event);
}

static void fill_private(uint64_t seed)
{
	for (unsigned page = 0; page < PRIVATE_PAGES; page++) {
		for (unsigned word = 0; word < WORDS; word++) {
			pages.before[page][word] = pattern(seed, page * WORDS + word);
			pages.after[page][word] = pattern(~seed, page * WORDS + word);
		}
	}
}

static bool private_is_intact(uint64_t seed)
{
	for (unsigned page = 0; page < PRIVATE_PAGES; page++) {
		for (unsigned word = 0; word < WORDS; word++) {
			if (pages.before[page][word] != pattern(seed, page * WORDS + word) ||
			    pages.after[page][word] != pattern(~seed, page * WORDS + word))
				return false;
		}
	}
	return true;
}

/* Print the VMM's reply, read once: the VMM may change it while it is looked at. */
static void tell_reply(void)
{
	const uint64_t *from = pages.shared + HALF / 8;
	uint64_t reply[16];

	for (unsigned i = 0; i < sizeof(reply) / 8; i++)
		reply[i] = read64((uint64_t)(from + i));
	put("sharing: the VMM says: ");
	put_foreign((const char *)reply, sizeof(reply));
	put_char('\n');
}

void program(const uint64_t *boot, unsigned cpu)
{
	uint64_t page = (uint64_t)pages.shared, seed;
	struct hypervisor hypervisor = ask_hypervisor();
	int64_t code;

	(void)boot;
	(void)cpu;
	console_start();

	/* Not a secret from anybody who watches the clock; different in every run is enough. */
	asm volatile("mrs %0, cntvct_el0" : "=r"(seed));
	fill_private(seed);
	memcpy(pages.shared, greeting, sizeof(greeting));

	if (hypervisor.protects) {
		code = (int64_t)hvc(KVM_MEM_SHARE, page, 0, 0).x0;
		if (code != SMCCC_SUCCESS)
			give_up("MEM_SHARE", code);
		put("sharing: shared the page at ");
	} else {
		put("sharing: not offered here, using the page as it is: ");
	}
	put_hex(page);
	put_char('\n');

	announce(MAILBOX_EVENT_SHARED, page, crc32(pages.shared, PAGE_BYTES), hypervisor.protects);
	tell_reply();

	if (hypervisor.protects) {
		code = (int64_t)hvc(KVM_MEM_UNSHARE, page, 0, 0).x0;
		if (code != SMCCC_SUCCESS)
			give_up("MEM_UNSHARE", code);
		put("sharing: took the page back\n");
	}
	announce(MAILBOX_EVENT_UNSHARED, page, 0, 0);

	if (!private_is_intact(seed)) {
		put("sharing: my private pages were CHANGED; resetting\n");
		psci_system_reset();
	}
	put("sharing: my private pages are as I left them\n");
	psci_system_off();
}
