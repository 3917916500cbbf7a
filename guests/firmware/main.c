/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest firmware: the first code of a protected VM, in a slot that EL2
 * filled. It checks the state in which it was entered against the RFC's
 * contract, asks the hypervisor what it offers, finds the payload through a
 * device tree that it does not trust, and enters it by the Linux boot protocol.
 * Whatever is not as promised ends in a reason on the console and a reset.
 */
#include "board.h"
#include "boot.h"
#include "console.h"
#include "fdt.h"
#include "firmware.h"
#include "psci.h"
#include "smccc.h"

#define SLOT_MAXIMUM (UINT64_C(1) << 30)

#define SCTLR_EL1_RESET 0x00C50078
#define DAIF_MASKED 0x3C0
#define CURRENT_EL1 (1 << 2)

/* Everything checked so far is as promised. */
static bool good = true;

_Noreturn void fail(const char *what, const char *why)
{
	put("firmware: ");
	put(what);
	put(": ");
	put(why);
	put("; resetting\n");
	psci_system_reset();
}

static void verdict(bool ok)
{
	put(ok ? ": ok\n" : ": BAD\n");
	good = good && ok;
}

static void check(const char *what, bool ok)
{
	put("  ");
	put(what);
	verdict(ok);
}

static void check_equal(const char *what, uint64_t found, uint64_t wanted)
{
	put("  ");
	put(what);
	if (found != wanted) {
		put(" is ");
		put_hex(found);
	}
	verdict(found == wanted);
}

/* Whether the words [from, to) of `boot` are 0. */
static bool are_zero(const uint64_t *boot, unsigned from, unsigned to)
{
	while (from < to)
		if (boot[from++])
			return false;
	return true;
}

static bool is_slot(uint64_t base, uint64_t end)
{
	return end % PAGE_BYTES == 0 && end > (uint64_t)image_end + STACK_BYTES &&
	       end - base <= SLOT_MAXIMUM;
}

/* EL2 zeroes what the image does not fill. The image's own data and the stack were in use since. */
static bool rest_is_zero(uint64_t slot_end)
{
	const uint64_t *word = (const uint64_t *)image_end;
	const uint64_t *end = (const uint64_t *)(slot_end - STACK_BYTES);

	while (word < end)
		if (*word++)
			return false;
	return true;
}

static void check_state(const uint64_t *boot, bool protected)
{
	uint64_t base = boot[BOOT_PC], end = boot[BOOT_SP];

	check_equal("X15, boot protocol version 0", boot[BOOT_X0 + 15], 0);
	check("X16-X30 zero", are_zero(boot, BOOT_X0 + 16, BOOT_X0 + 31));
	check_equal("EL1", boot[BOOT_CURRENT_EL], CURRENT_EL1);
	check("SP_EL1 in use, D, A, I, F masked, flags clear",
	      boot[BOOT_SPSEL] == 1 && boot[BOOT_DAIF] == DAIF_MASKED && boot[BOOT_NZCV] == 0);
	check_equal("SCTLR_EL1 at reset", boot[BOOT_SCTLR_EL1], SCTLR_EL1_RESET);
	check("CPACR, VBAR, TCR, CONTEXTIDR, CNTKCTL, CNTV_CTL zero",
	      are_zero(boot, BOOT_CPACR_EL1, BOOT_TCR_EL1 + 1) &&
	      boot[BOOT_CONTEXTIDR_EL1] == 0 && boot[BOOT_CNTKCTL_EL1] == 0 &&
	      (boot[BOOT_CNTV_CTL_EL0] & 1) == 0);
	check("SP_EL0, ELR, SPSR zero", are_zero(boot, BOOT_SP_EL0, BOOT_SPSR_EL1 + 1));
	put("  SP at the slot's end, ");
	put_hex(end);
	verdict(is_slot(base, end));
	/* KVM leaves these unknown in an ordinary VM; nobody may have spoken through them here. */
	if (protected) {
		check("TPIDRs, TTBRs zero",
		      are_zero(boot, BOOT_TPIDR_EL0, BOOT_TPIDRRO_EL0 + 1) &&
		      are_zero(boot, BOOT_TTBR0_EL1, BOOT_TTBR1_EL1 + 1));
		if (is_slot(base, end))
			check("rest of the slot zero", rest_is_zero(end));
	}
}

static void put_version(uint32_t version)
{
	put_decimal(version >> 16);
	put_char('.');
	put_decimal(version & 0xFFFF);
}

static void check_hypervisor(const struct hypervisor *found)
{
	put("  SMCCC ");
	put_version(found->smccc);
	verdict(found->smccc >= 0x10001 && found->smccc >> 31 == 0);
	put("  PSCI ");
	put_version(found->psci);
	verdict(found->psci >= 0x10000 && found->psci >> 31 == 0);
	if (!found->protects) {
		put(found->is_kvm ? "  KVM; not a protected VM\n"
				  : "  no KVM services; not a protected VM\n");
		return;
	}
	put("  KVM, protected VM, granule ");
	put_decimal(found->granule);
	verdict(found->granule == PAGE_BYTES);
}

/*
 * Make sure that [base, base + bytes) is memory and not a device that the host
 * plays. A load of a register pair has no valid syndrome, so a host cannot
 * answer one: where there is no memory it ends in an abort, and the exception
 * vector. Memory in a protected VM is the VM's own and stays.
 */
static void touch(struct range range)
{
	uint64_t ignored, also;

	if (range.bytes == 0)
		return;
	for (uint64_t at = range.base & ~15ull; at < range.base + range.bytes; at += PAGE_BYTES)
		asm volatile("ldp %0, %1, [%2]" : "=r"(ignored), "=r"(also) : "r"(at) : "memory");
	asm volatile("ldp %0, %1, [%2]"
		     : "=r"(ignored), "=r"(also)
		     : "r"((range.base + range.bytes - 1) & ~15ull)
		     : "memory");
}

static void open_tree(struct fdt *tree, uint64_t at)
{
	enum fdt_status status = FDT_OK;
	uint32_t bytes = 0;

	if (at % 8)
		status = FDT_UNALIGNED;
	else if (at < BOARD_RAM || at > BOARD_IPA_END - FDT_MAXIMUM)
		fail("device tree", "X0 is not an address in RAM");
	if (status == FDT_OK) {
		touch((struct range){at, FDT_HEADER_BYTES});
		status = fdt_size((const void *)at, &bytes);
	}
	if (status == FDT_OK) {
		touch((struct range){at, bytes});
		status = fdt_open(tree, (const void *)at);
	}
	if (status != FDT_OK)
		fail("device tree", fdt_words(status));
}

static struct range find_memory(const struct fdt *tree, struct range slot)
{
	struct range memory, blob = {(uint64_t)tree->blob, tree->bytes};
	enum fdt_status status = fdt_memory(tree, &memory.base, &memory.bytes);

	if (status != FDT_OK)
		fail("device tree: /memory", fdt_words(status));
	if (memory.base != BOARD_RAM || memory.bytes > BOARD_IPA_END - BOARD_RAM)
		fail("device tree: /memory", "not at the board's RAM");
	if (overlap(memory, slot))
		fail("device tree: /memory", "overlaps the firmware");
	if (!is_within(blob, memory))
		fail("device tree", "not in /memory");
	return memory;
}

/* One of /config's numbers. */
static uint64_t config(const struct fdt *tree, uint32_t node, const char *name)
{
	uint64_t value = 0;
	enum fdt_status status = fdt_u64(tree, node, name, &value);

	if (status != FDT_OK) {
		put("  /config ");
		put(name);
		put(": BAD\n");
		fail("device tree: /config", fdt_words(status));
	}
	return value;
}

/* The payload that the device tree describes, and where to enter it. */
static struct range find_payload(const struct fdt *tree, struct range memory, uint64_t *entry)
{
	struct range payload, blob = {(uint64_t)tree->blob, tree->bytes};
	uint32_t node;
	enum fdt_status status = fdt_node(tree, "/config", &node);

	if (status != FDT_OK)
		fail("device tree: /config", fdt_words(status));

	payload.base = config(tree, node, "kernel-address");
	payload.bytes = config(tree, node, "kernel-size");
	*entry = config(tree, node, "kernel-entry");

	put("  payload ");
	put_hex(payload.base);
	put(", ");
	put_decimal(payload.bytes);
	put(" bytes, entry ");
	put_hex(*entry);
	put_char('\n');
	if (payload.bytes == 0 || !is_within(payload, memory))
		fail("payload", "not in /memory");
	if (overlap(payload, blob))
		fail("payload", "overlaps the device tree");
	if (*entry % 4 || !is_within((struct range){*entry, 4}, payload))
		fail("payload", "entry outside of it or not aligned to 4 bytes");
	return payload;
}

void program(const uint64_t *boot, unsigned cpu)
{
	struct hypervisor hypervisor = ask_hypervisor();
	struct range slot = {boot[BOOT_PC], boot[BOOT_SP] - boot[BOOT_PC]};
	struct range memory, payload;
	struct fdt tree;
	uint64_t entry;

	(void)cpu;
	console_start();
	put("firmware: entered at ");
	put_hex(slot.base);
	put_char('\n');
	check_state(boot, hypervisor.protects);
	check_hypervisor(&hypervisor);
	if (!good)
		fail("hand-over", "not the state that was promised");

	open_tree(&tree, boot[BOOT_X0]);
	memory = find_memory(&tree, slot);
	put("  device tree ");
	put_hex(boot[BOOT_X0]);
	put(", ");
	put_decimal(tree.bytes);
	put(" bytes; RAM ");
	put_hex(memory.base);
	put(", ");
	put_decimal(memory.bytes >> 20);
	put(" MiB\n");
	payload = find_payload(&tree, memory, &entry);
	touch(payload);
	check_image(payload, entry);
	touch(find_initrd(&tree, memory, payload));

	put("firmware: all as promised, starting the payload\n");
	enter_payload(entry, boot[BOOT_X0], slot.base + slot.bytes);
}
