/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Bring up every CPU of the device tree by PSCI and send it off again.
 *
 * With the MMU off memory is Device memory, on which exclusive accesses promise
 * nothing, so CPUs take turns by a plain counter: CPU n speaks when it stands at
 * n, and only it advances the counter then.
 */
#include "board.h"
#include "boot.h"
#include "console.h"
#include "fdt.h"
#include "psci.h"

#define CONTEXT 0xC0DE000000000000
#define MPIDR_AFFINITY 0xFF00FFFFFF
/* A CPU that no board here has. */
#define NOBODY 0xFF0000

/* The device tree's CPUs; the order is that of the tree. */
static uint64_t affinity[BOARD_CPUS];
static unsigned count;
static volatile unsigned turn;
static volatile unsigned leave;
static volatile unsigned failures;

static _Noreturn void fail(const char *why)
{
	put("smp: ");
	put(why);
	put("; resetting\n");
	psci_system_reset();
}

static void expect(const char *what, uint64_t mpidr, int64_t code, int64_t wanted)
{
	if (code == wanted)
		return;
	put("smp: ");
	put(what);
	put(" of CPU ");
	put_hex(mpidr);
	put(" says ");
	put(psci_words(code));
	put(" (");
	put_signed(code);
	put("), not ");
	put_signed(wanted);
	put_char('\n');
	failures++;
}

static uint64_t own_affinity(const uint64_t *boot)
{
	return boot[BOOT_MPIDR_EL1] & MPIDR_AFFINITY;
}

static void wait_for_turn(unsigned number)
{
	while (turn != number)
		asm volatile("yield" : : : "memory");
	asm volatile("dmb sy" : : : "memory");
}

static void end_turn(unsigned number)
{
	asm volatile("dmb sy" : : : "memory");
	turn = number + 1;
	asm volatile("dsb sy" : : : "memory");
}

void secondary_program(const uint64_t *boot, unsigned cpu)
{
	unsigned number = 0;

	(void)cpu;
	while (number < count && affinity[number] != own_affinity(boot))
		number++;
	if (number == count)
		psci_cpu_off(); /* nobody waits for it; the primary will find its turn missing */

	wait_for_turn(number);
	put("smp: CPU ");
	put_hex(own_affinity(boot));
	put(" is up");
	if (boot[BOOT_X0] != CONTEXT + number) {
		put(" with a WRONG context ");
		put_hex(boot[BOOT_X0]);
		failures++;
	}
	for (unsigned i = BOOT_X0 + 1; i <= BOOT_SP; i++) {
		if (boot[i]) {
			put(" with registers NOT ZERO");
			failures++;
			break;
		}
	}
	put_char('\n');
	end_turn(number);
	while (!leave)
		asm volatile("yield" : : : "memory");
	psci_cpu_off();
}

void program(const uint64_t *boot, unsigned cpu)
{
	uint64_t self = own_affinity(boot);
	struct fdt tree;
	enum fdt_status status;
	unsigned total;

	(void)cpu;
	console_start();
	status = fdt_open(&tree, (const void *)boot[BOOT_X0]);
	if (status == FDT_OK)
		status = fdt_cpus(&tree, affinity, BOARD_CPUS, &total);
	if (status != FDT_OK)
		fail(fdt_words(status));
	count = total < BOARD_CPUS ? total : BOARD_CPUS;
	put("smp: ");
	put_decimal(count);
	put(" CPUs, this is ");
	put_hex(self);
	put_char('\n');

	for (unsigned i = 0; i < count; i++) {
		if (affinity[i] == self) {
			wait_for_turn(i);
			expect("CPU_ON (itself)", self, psci_cpu_on(self, (uint64_t)secondary_start, 0),
			       PSCI_ALREADY_ON);
			end_turn(i);
			continue;
		}
		expect("AFFINITY_INFO before", affinity[i], psci_affinity_info(affinity[i]),
		       PSCI_AFFINITY_OFF);
		expect("CPU_ON", affinity[i],
		       psci_cpu_on(affinity[i], (uint64_t)secondary_start, CONTEXT + i),
		       PSCI_SUCCESS);
		if (failures)
			fail("a CPU did not start");
	}
	wait_for_turn(count);

	for (unsigned i = 0; i < count; i++) {
		expect("AFFINITY_INFO", affinity[i], psci_affinity_info(affinity[i]),
		       PSCI_AFFINITY_ON);
		expect("second CPU_ON", affinity[i],
		       psci_cpu_on(affinity[i], (uint64_t)secondary_start, 0), PSCI_ALREADY_ON);
	}
	expect("CPU_ON", NOBODY, psci_cpu_on(NOBODY, (uint64_t)secondary_start, 0),
	       PSCI_INVALID_PARAMETERS);

	leave = 1;
	for (unsigned i = 0; i < count; i++) {
		if (affinity[i] == self)
			continue;
		while (psci_affinity_info(affinity[i]) != PSCI_AFFINITY_OFF)
			asm volatile("yield" : : : "memory");
	}
	if (failures)
		fail("something was not as PSCI says");
	put("smp: all others are off again\n");
	psci_system_off();
}
