/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Take interrupts: set a GICv3 up, then a tick of each timer, an SPI that the VMM
 * raises when it is asked to, and an SGI to and from a second CPU, each waited
 * for by WFI. Interrupts stay masked at the PE: WFI ends all the same, and the
 * interrupt is taken by reading ICC_IAR1_EL1, so that no vector is needed.
 *
 * The VMM is told of each by MAILBOX_EVENT_NOTE with the INTID as its number.
 */
#include "board.h"
#include "boot.h"
#include "console.h"
#include "mailbox.h"
#include "psci.h"

#define GICD_CTLR (BOARD_GICD + 0x0000)
#define GICD_PIDR2 (BOARD_GICD + 0xFFE8)
#define GICD_ISENABLER (BOARD_GICD + 0x0100)
#define GICD_IROUTER (BOARD_GICD + 0x6000)
#define GICR_FRAMES 0x20000
#define GICR_TYPER 0x0008
#define GICR_TYPER_LAST 0x10
#define GICR_WAKER 0x0014
#define GICR_ISENABLER 0x10100
#define CTLR_ENABLE 2
#define WAKER_SLEEP 2
#define WAKER_ASLEEP 4
#define ALL_PRIORITIES 0xF0

#define SGI 3
#define VIRTUAL_TIMER 27
#define PHYSICAL_TIMER 30
/* SPI 63, which no device of the board has. */
#define SPI 95
#define SPURIOUS 1023
#define TIMER_ENABLE 1
#define MPIDR_AFFINITY 0xFF00FFFFFF
#define SECOND 1

#define read_register(name)                                                                       \
	({                                                                                        \
		uint64_t value_;                                                                  \
		asm volatile("mrs %0, " name : "=r"(value_) : : "memory");                        \
		value_;                                                                           \
	})
#define write_register(name, value)                                                               \
	asm volatile("msr " name ", %0\n\tisb" : : "r"((uint64_t)(value)) : "memory")
#define ICC_IAR1 "S3_0_C12_C12_0"
#define ICC_EOIR1 "S3_0_C12_C12_1"
#define ICC_PMR "S3_0_C4_C6_0"
#define ICC_IGRPEN1 "S3_0_C12_C12_7"
#define ICC_SGI1R "S3_0_C12_C11_5"

static uint32_t read32(uint64_t address)
{
	return *(volatile uint32_t *)address;
}

static void write32(uint64_t address, uint32_t value)
{
	*(volatile uint32_t *)address = value;
}

static uint64_t read64(uint64_t address)
{
	return *(volatile uint64_t *)address;
}

static void write64(uint64_t address, uint64_t value)
{
	*(volatile uint64_t *)address = value;
}

static _Noreturn void fail(const char *why, uint64_t value)
{
	put("irq: ");
	put(why);
	put_char(' ');
	put_hex(value);
	put("; resetting\n");
	psci_system_reset();
}

/* This CPU's redistributor, by its affinity. */
static uint64_t own_redistributor(void)
{
	uint64_t self = read_register("mpidr_el1") & 0xFFFFFF;
	uint64_t frames = BOARD_GICR;

	while (read64(frames + GICR_TYPER) >> 32 != self) {
		if (read64(frames + GICR_TYPER) & GICR_TYPER_LAST)
			fail("no redistributor for CPU", self);
		frames += GICR_FRAMES;
	}
	return frames;
}

static void start_cpu_interface(void)
{
	uint64_t frames = own_redistributor();

	write32(frames + GICR_WAKER, read32(frames + GICR_WAKER) & ~WAKER_SLEEP);
	while (read32(frames + GICR_WAKER) & WAKER_ASLEEP)
		;
	write32(frames + GICR_ISENABLER, 1 << SGI | 1 << VIRTUAL_TIMER | 1 << PHYSICAL_TIMER);
	write_register(ICC_PMR, ALL_PRIORITIES);
	write_register(ICC_IGRPEN1, 1);
}

/* Wait for an interrupt, which must be `wanted`, and take it. */
static void wait_for(uint64_t wanted)
{
	uint64_t taken;

	/* A WFI may end early. */
	do {
		asm volatile("dsb sy\n\twfi" : : : "memory");
		taken = read_register(ICC_IAR1);
	} while (taken == SPURIOUS);
	if (taken != wanted)
		fail("took interrupt", taken);
}

static void end(uint64_t intid)
{
	write_register(ICC_EOIR1, intid);
	asm volatile("dsb sy" : : : "memory");
}

static void note(uint64_t number)
{
	uint64_t bank = BOARD_MAILBOX + MAILBOX_BANK * (read_register("mpidr_el1") & 0xF);

	write64(bank + MAILBOX_ARG, number);
	write64(bank + MAILBOX_COMMAND, MAILBOX_EVENT_NOTE);
}

void secondary_program(const uint64_t *boot, unsigned cpu)
{
	(void)boot;
	(void)cpu;
	start_cpu_interface();
	/* The first CPU waits for this, whose sender is up then. */
	write_register(ICC_SGI1R, (uint64_t)SGI << 24 | 1);
	wait_for(SGI);
	end(SGI);
	write_register(ICC_SGI1R, (uint64_t)SGI << 24 | 1);
	psci_cpu_off();
}

void program(const uint64_t *boot, unsigned cpu)
{
	uint64_t start;

	(void)boot;
	(void)cpu;
	console_start();
	if (read32(GICD_PIDR2) >> 4 != 3)
		fail("no GICv3: PIDR2 is", read32(GICD_PIDR2));
	write32(GICD_CTLR, CTLR_ENABLE);
	start_cpu_interface();

	start = read_register("cntvct_el0");
	write_register("cntv_tval_el0", read_register("cntfrq_el0") / 100);
	write_register("cntv_ctl_el0", TIMER_ENABLE);
	wait_for(VIRTUAL_TIMER);
	if (read_register("cntvct_el0") - start < read_register("cntfrq_el0") / 100)
		fail("the virtual timer was early by", start);
	write_register("cntv_ctl_el0", 0);
	end(VIRTUAL_TIMER);
	note(VIRTUAL_TIMER);

	write_register("cntp_tval_el0", read_register("cntfrq_el0") / 100);
	write_register("cntp_ctl_el0", TIMER_ENABLE);
	wait_for(PHYSICAL_TIMER);
	write_register("cntp_ctl_el0", 0);
	end(PHYSICAL_TIMER);
	note(PHYSICAL_TIMER);

	write64(GICD_IROUTER + 8 * SPI, read_register("mpidr_el1") & MPIDR_AFFINITY);
	write32(GICD_ISENABLER + SPI / 32 * 4, 1u << SPI % 32);
	note(SPI); /* raise it */
	wait_for(SPI);
	note(SPI); /* lower it */
	end(SPI);
	if (read_register(ICC_IAR1) != SPURIOUS)
		fail("the line is low and interrupts again", SPI);

	if (psci_cpu_on(SECOND, (uint64_t)secondary_start, 0) == PSCI_SUCCESS) {
		wait_for(SGI);
		end(SGI);
		write_register(ICC_SGI1R, (uint64_t)SGI << 24 | 1 << SECOND);
		wait_for(SGI);
		end(SGI);
		while (psci_affinity_info(SECOND) != PSCI_AFFINITY_OFF)
			asm volatile("yield");
		note(SGI);
	}
	put("irq: took every interrupt\n");
	psci_system_off();
}
