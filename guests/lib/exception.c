/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What vectors.S calls: an exception that nobody expected, in words. */
#include "console.h"
#include "psci.h"

_Noreturn void report_exception(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far,
				uint64_t depth);

_Noreturn void report_exception(uint64_t vector, uint64_t esr, uint64_t elr, uint64_t far,
				uint64_t depth)
{
	/* The report itself failed: the console is not there. */
	if (depth > 1)
		psci_system_reset();

	put("\nexception: vector ");
	put_hex(vector);
	put(", ESR ");
	put_hex(esr);
	put(", at ");
	put_hex(elr);
	put(", FAR ");
	put_hex(far);
	put("; resetting\n");
	psci_system_reset();
}
