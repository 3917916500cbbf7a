/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The smallest payload: say hello, tell the command line, power off. */
#include "boot.h"
#include "console.h"
#include "fdt.h"
#include "psci.h"

/* Print /chosen's bootargs; a machine without a device tree is fine. */
static void tell_arguments(uint64_t address)
{
	const char *arguments;
	struct fdt tree;
	uint32_t chosen;

	if (address == 0 || fdt_open(&tree, (const void *)address) != FDT_OK)
		return;
	if (fdt_node(&tree, "/chosen", &chosen) != FDT_OK ||
	    fdt_string(&tree, chosen, "bootargs", &arguments) != FDT_OK)
		return;
	put("hello: arguments: ");
	put_foreign(arguments, FDT_MAXIMUM);
	put_char('\n');
}

void program(const uint64_t *boot, unsigned cpu)
{
	(void)cpu;
	console_start();
	put("hello from the guest\n");
	tell_arguments(boot[BOOT_X0]);
	psci_system_off();
}
