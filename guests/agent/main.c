/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The agent: carries out one command at a time, for tests. agent.h has the
 * commands, mailbox.h the registers.
 *
 * It runs behind the firmware or as the firmware, at any page-aligned address,
 * and on its own stacks, so that a test sees the stack pointer it was given as
 * one more word of the entry state. It never touches the console.
 */
#include "agent.h"

#include "board.h"
#include "boot.h"
#include "internal.h"
#include "io.h"
#include "mailbox.h"
#include "text.h"

#define SCRATCH_PAGES 4
#define CODE_WORDS 4

#define SPSR_AARCH32 (1 << 4)
#define SPSR_THUMB (1 << 5)
#define A64_RET 0xD65F03C0
#define A64_NOP 0xD503201F
#define A64_SVC 0xD4000001
#define A32_SVC 0xEF000000
#define T32_SVC_TWICE 0xDF00DF00

#define CPACR_FPEN (UINT64_C(3) << 20)

static struct cpu cpus[BOARD_CPUS];
static uint8_t scratch[SCRATCH_PAGES * PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));

/*** The mailbox. */

static uint64_t argument(const struct cpu *cpu, unsigned n)
{
	return read64(cpu->mailbox + MAILBOX_ARG + 8 * n);
}

static void result(const struct cpu *cpu, unsigned n, uint64_t value)
{
	if (value)
		write64(cpu->mailbox + MAILBOX_RESULT + 8 * n, value);
}

static void finish(const struct cpu *cpu, uint64_t status)
{
	write64(cpu->mailbox + MAILBOX_STATUS, status);
}

/* ARG0 and DATA: the operation's X registers. False if there are too many. */
static bool read_registers(struct cpu *cpu, unsigned *count)
{
	uint64_t given = argument(cpu, 0);

	if (given > MAILBOX_DATAS)
		return false;
	memset(cpu->x, 0, sizeof(cpu->x));
	for (unsigned i = 0; i < given; i++)
		cpu->x[i] = read64(cpu->mailbox + MAILBOX_DATA + 8 * i);
	*count = (unsigned)given;
	return true;
}

static void tell_exception(const struct cpu *cpu, uint64_t status)
{
	result(cpu, 0, cpu->esr);
	result(cpu, 1, cpu->far);
	result(cpu, 2, cpu->elr);
	result(cpu, 3, cpu->spsr);
	result(cpu, 4, cpu->vector);
	for (unsigned i = 0; i < 3; i++)
		result(cpu, 5 + i, cpu->x[i]);
	finish(cpu, status);
}

/* Run something and tell X0-X7 or its exception. */
static void run_and_tell(struct cpu *cpu, uint64_t target, uint64_t spsr)
{
	if (run_operation(cpu, target, spsr) == EXCEPTION) {
		tell_exception(cpu, AGENT_STATUS_EXCEPTION);
		return;
	}
	for (unsigned i = 0; i < 8; i++)
		result(cpu, i, cpu->x[i]);
	finish(cpu, AGENT_STATUS_DONE);
}

/*** Operations that are functions. They run like the others: with faults caught. */

static void mem_fill(uint64_t *words, uint64_t bytes, uint64_t seed)
{
	for (uint64_t i = 0; i < bytes / 8; i++)
		words[i] = pattern(seed, i);
}

static struct two mem_check(const uint64_t *words, uint64_t bytes, uint64_t seed)
{
	struct two found = {0, 0};

	for (uint64_t i = 0; i < bytes / 8; i++) {
		if (words[i] == pattern(seed, i))
			continue;
		if (found.x0++ == 0)
			found.x1 = (uint64_t)&words[i];
	}
	return found;
}

static void mem_set(uint64_t *words, uint64_t bytes, uint64_t word)
{
	for (uint64_t i = 0; i < bytes / 8; i++)
		words[i] = word;
}

static struct two v_get(uint64_t n)
{
	uint64_t v[64];

	store_v(v);
	return (struct two){v[2 * (n % 32)], v[2 * (n % 32) + 1]};
}

static void v_set(uint64_t n, uint64_t low, uint64_t high)
{
	uint64_t v[64];

	store_v(v);
	v[2 * (n % 32)] = low;
	v[2 * (n % 32) + 1] = high;
	load_v(v);
}

/* An operation's address, 0 if there is none of this number. */
static uint64_t operation(uint64_t number)
{
	switch (number) {
	case AGENT_OP_MEM_FILL:
		return (uint64_t)mem_fill;
	case AGENT_OP_MEM_CHECK:
		return (uint64_t)mem_check;
	case AGENT_OP_MEM_SET:
		return (uint64_t)mem_set;
	case AGENT_OP_MEM_CRC:
		return (uint64_t)crc32;
	case AGENT_OP_V_GET:
		return (uint64_t)v_get;
	case AGENT_OP_V_SET:
		return (uint64_t)v_set;
	case AGENT_OP_MMU_ON:
		return (uint64_t)mmu_on;
	case AGENT_OP_MMU_OFF:
		return (uint64_t)mmu_off;
	case AGENT_OP_MMU_RUBBISH:
		return (uint64_t)mmu_rubbish;
	}
	if (number >= (uint64_t)(operations_end - operations + 15) / 16)
		return 0;
	return (uint64_t)operations + 16 * number;
}

/*** Commands. */

static void run(struct cpu *cpu)
{
	uint64_t target = operation(argument(cpu, 1));
	unsigned count;

	if (!target || !read_registers(cpu, &count)) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	run_and_tell(cpu, target, CALL);
}

/* Put ARG1-ARG4 and `last` where they can be executed, at EL0 too. */
static uint64_t place_code(struct cpu *cpu, uint32_t nop, uint32_t last)
{
	for (unsigned i = 0; i < CODE_WORDS; i++) {
		uint32_t word = (uint32_t)argument(cpu, 1 + i);

		cpu->code[i] = word ? word : nop;
	}
	cpu->code[CODE_WORDS] = last;
	/* A cache line may be as short as 16 bytes. */
	asm volatile("dc cvau, %0\n\t"
		     "dc cvau, %1\n\t"
		     "dsb ish\n\t"
		     "ic ivau, %0\n\t"
		     "ic ivau, %1\n\t"
		     "dsb ish\n\t"
		     "isb"
		     :
		     : "r"(cpu->code), "r"(cpu->code + CODE_WORDS)
		     : "memory");
	return (uint64_t)cpu->code;
}

static void execute(struct cpu *cpu)
{
	unsigned count;

	if (!read_registers(cpu, &count)) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	run_and_tell(cpu, place_code(cpu, A64_NOP, A64_RET), CALL);
}

static void branch(struct cpu *cpu)
{
	unsigned count;

	if (!read_registers(cpu, &count)) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	run_and_tell(cpu, argument(cpu, 1), CALL);
}

static void eret(struct cpu *cpu)
{
	uint64_t spsr = argument(cpu, 5);
	uint32_t nop = A64_NOP, last = A64_SVC;
	unsigned count;

	if (spsr == CALL || !read_registers(cpu, &count)) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	if (spsr & SPSR_AARCH32) {
		nop = 0; /* as an instruction, too: ANDEQ R0, R0, R0 and MOVS R0, R0 */
		last = spsr & SPSR_THUMB ? T32_SVC_TWICE : A32_SVC;
	}
	run_and_tell(cpu, place_code(cpu, nop, last), spsr);
}

/* The system registers that SEALED fills: bit in the mask, name, bits that keep what is written. */
#define SEALED_REGISTERS(each)                    \
	each(AGENT_SEALED_SP_EL0, sp_el0, ~15ull) \
	each(AGENT_SEALED_TPIDR_EL0, tpidr_el0, ~0ull) \
	each(AGENT_SEALED_TPIDR_EL1, tpidr_el1, ~0ull) \
	each(AGENT_SEALED_ELR_EL1, elr_el1, ~0ull) \
	each(AGENT_SEALED_FAR_EL1, far_el1, ~0ull) \
	each(AGENT_SEALED_TTBR1_EL1, ttbr1_el1, 0xFFFFFFFFF000ull) \
	each(AGENT_SEALED_FPSR, fpsr, 0x0800009Full) \
	each(AGENT_SEALED_FPCR, fpcr, 0x03C00000ull)

#define SEALED_V 64 /* where the pattern of V0-V31 and of the system registers starts */
#define SEALED_SYSTEM 128

static void sealed(struct cpu *cpu)
{
	uint64_t number = argument(cpu, 1), seed = argument(cpu, 2), target = operation(number);
	uint64_t v[64], changed_x = 0, changed_v = 0, changed_system = 0, first = 0;
	uint64_t status;
	unsigned count;

	if (!target || number >= AGENT_OP_FUNCTIONS || !read_registers(cpu, &count)) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	for (unsigned i = count; i < 30; i++)
		cpu->x[i] = pattern(seed, i);
	for (unsigned i = 0; i < 64; i++)
		v[i] = pattern(seed, SEALED_V + i);
	load_v(v);

#define FILL(bit, name, bits) \
	asm volatile("msr " #name ", %0" : : "r"(pattern(seed, SEALED_SYSTEM + bit) & bits));
	SEALED_REGISTERS(FILL)

	status = run_operation(cpu, target, CALL);

#define COMPARE(bit, name, bits)                                                     \
	{                                                                            \
		uint64_t now;                                                        \
		asm volatile("mrs %0, " #name : "=r"(now));                          \
		if ((now & bits) != (pattern(seed, SEALED_SYSTEM + bit) & bits))     \
			changed_system |= bit;                                       \
		asm volatile("msr " #name ", xzr");                                  \
	}
	SEALED_REGISTERS(COMPARE)

	if (status == EXCEPTION) {
		tell_exception(cpu, AGENT_STATUS_EXCEPTION);
		return;
	}
	store_v(v);
	for (unsigned i = count; i < 30; i++) {
		if (cpu->x[i] == pattern(seed, i))
			continue;
		if (!changed_x)
			first = cpu->x[i];
		changed_x |= UINT64_C(1) << i;
	}
	for (unsigned i = 0; i < 64; i++)
		if (v[i] != pattern(seed, SEALED_V + i))
			changed_v |= UINT64_C(1) << i / 2;
	result(cpu, 0, changed_x);
	result(cpu, 1, changed_v);
	result(cpu, 2, changed_system);
	for (unsigned i = 0; i < 4; i++)
		result(cpu, 3 + i, cpu->x[i]);
	result(cpu, 7, first);
	finish(cpu, AGENT_STATUS_DONE);
}

static void boot(const struct cpu *cpu)
{
	uint64_t from = argument(cpu, 0);

	if (from > BOOT_WORDS - 8) {
		finish(cpu, AGENT_STATUS_BAD_COMMAND);
		return;
	}
	for (unsigned i = 0; i < 8; i++)
		result(cpu, i, cpu->boot[from + i]);
	finish(cpu, AGENT_STATUS_DONE);
}

static void info(const struct cpu *cpu)
{
	result(cpu, AGENT_INFO_BASE, (uint64_t)image_start);
	result(cpu, AGENT_INFO_END, (uint64_t)image_end);
	result(cpu, AGENT_INFO_SECONDARY, (uint64_t)secondary_start);
	result(cpu, AGENT_INFO_SCRATCH, (uint64_t)scratch);
	result(cpu, AGENT_INFO_SCRATCH_BYTES, sizeof(scratch));
	result(cpu, AGENT_INFO_CODE, (uint64_t)cpu->code);
	result(cpu, AGENT_INFO_TABLES, mmu_tables());
	result(cpu, AGENT_INFO_ABI, AGENT_ABI);
	finish(cpu, AGENT_STATUS_DONE);
}

static _Noreturn void serve(struct cpu *cpu)
{
	for (;;) {
		switch (read64(cpu->mailbox + MAILBOX_COMMAND)) {
		case AGENT_COMMAND_NONE:
			break;
		case AGENT_COMMAND_RUN:
			run(cpu);
			break;
		case AGENT_COMMAND_SEALED:
			sealed(cpu);
			break;
		case AGENT_COMMAND_EXECUTE:
			execute(cpu);
			break;
		case AGENT_COMMAND_BRANCH:
			branch(cpu);
			break;
		case AGENT_COMMAND_ERET:
			eret(cpu);
			break;
		case AGENT_COMMAND_BOOT:
			boot(cpu);
			break;
		case AGENT_COMMAND_INFO:
			info(cpu);
			break;
		default:
			finish(cpu, AGENT_STATUS_BAD_COMMAND);
			break;
		}
	}
}

void unexpected(struct cpu *cpu)
{
	tell_exception(cpu, AGENT_STATUS_UNEXPECTED);
	serve(cpu);
}

static _Noreturn void begin(const uint64_t *entry_state, unsigned number)
{
	struct cpu *cpu = &cpus[number];

	cpu->stack = (uint64_t)stacks + ((uint64_t)number + 1) * STACK_BYTES;
	cpu->mailbox = BOARD_MAILBOX + MAILBOX_BANK * number;
	cpu->boot = entry_state;
	asm volatile("msr tpidrro_el0, %0\n\t"
		     "msr cpacr_el1, %1\n\t"
		     "isb"
		     :
		     : "r"(cpu), "r"(CPACR_FPEN));
	serve(cpu);
}

void program(const uint64_t *entry_state, unsigned cpu)
{
	begin(entry_state, cpu);
}

void secondary_program(const uint64_t *entry_state, unsigned cpu)
{
	begin(entry_state, cpu);
}
