/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "psci.h"

#include "smccc.h"

static _Noreturn void wait_for_ever(void)
{
	for (;;)
		asm volatile("wfi" : : : "memory");
}

int64_t psci_cpu_on(uint64_t mpidr, uint64_t entry, uint64_t context)
{
	return (int64_t)hvc(PSCI_CPU_ON, mpidr, entry, context).x0;
}

int64_t psci_affinity_info(uint64_t mpidr)
{
	return (int64_t)hvc(PSCI_AFFINITY_INFO, mpidr, 0, 0).x0;
}

void psci_cpu_off(void)
{
	hvc(PSCI_CPU_OFF, 0, 0, 0);
	wait_for_ever();
}

void psci_system_off(void)
{
	hvc(PSCI_SYSTEM_OFF, 0, 0, 0);
	wait_for_ever();
}

void psci_system_reset(void)
{
	hvc(PSCI_SYSTEM_RESET, 0, 0, 0);
	wait_for_ever();
}

const char *psci_words(int64_t code)
{
	switch (code) {
	case 0:
		return "success";
	case -1:
		return "not supported";
	case -2:
		return "invalid parameters";
	case -3:
		return "denied";
	case -4:
		return "already on";
	case -5:
		return "on pending";
	case -6:
		return "internal failure";
	case -7:
		return "not present";
	case -8:
		return "disabled";
	case -9:
		return "invalid address";
	default:
		return "unknown code";
	}
}
