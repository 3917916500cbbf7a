/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "fdt.h"

#include <stddef.h>

#include "text.h"

#define MAGIC 0xD00DFEED
#define OLDEST_VERSION 16
#define VERSION 17
#define RESERVE_ENTRY_BYTES 16
#define DEEPEST 64

enum token { BEGIN_NODE = 1, END_NODE = 2, PROP = 3, NOP = 4, END = 9 };

/* Header fields, as offsets in bytes. */
enum header {
	H_MAGIC = 0,
	H_TOTALSIZE = 4,
	H_STRUCT = 8,
	H_STRINGS = 12,
	H_RESERVE = 16,
	H_VERSION = 20,
	H_COMPATIBLE = 24,
	H_STRINGS_SIZE = 32,
	H_STRUCT_SIZE = 36,
};

/* One token of the structure block with what belongs to it. */
struct item {
	uint32_t token;
	uint32_t next;		/* where the following token starts */
	const char *name;	/* of a node or a property; ends with NUL inside the blob */
	const uint8_t *value;
	uint32_t bytes;
};

const char *fdt_words(enum fdt_status status)
{
	switch (status) {
	case FDT_OK:
		return "ok";
	case FDT_UNALIGNED:
		return "not aligned to 8 bytes";
	case FDT_MAGIC:
		return "no device tree there";
	case FDT_VERSION:
		return "not of version 17";
	case FDT_SIZE:
		return "of an impossible size";
	case FDT_LAYOUT:
		return "its blocks do not fit in it";
	case FDT_STRUCTURE:
		return "malformed structure";
	case FDT_MISSING:
		return "missing";
	case FDT_TWICE:
		return "there twice";
	case FDT_VALUE:
		return "of a wrong form";
	}
	return "unknown";
}

static uint32_t be32(const uint8_t *at)
{
	return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static uint64_t be64(const uint8_t *at)
{
	return (uint64_t)be32(at) << 32 | be32(at + 4);
}

/* The length of the string at `at`, or false if no NUL ends it before `end`. */
static bool string_at(const struct fdt *tree, uint32_t at, uint32_t end, uint32_t *bytes)
{
	for (uint32_t i = at; i < end; i++) {
		if (tree->blob[i] == 0) {
			*bytes = i - at;
			return true;
		}
	}
	return false;
}

/*
 * The token at `at`; false if it, or anything that it refers to, is not inside
 * its block. Offsets stay below 2 * FDT_MAXIMUM, so that sums cannot wrap.
 */
static bool item_at(const struct fdt *tree, uint32_t at, struct item *item)
{
	uint32_t room, bytes;

	if (at % 4 || at >= tree->structure_end || tree->structure_end - at < 4)
		return false;
	room = tree->structure_end - at - 4;
	item->token = be32(tree->blob + at);
	item->next = at + 4;

	switch (item->token) {
	case END_NODE:
	case NOP:
	case END:
		return true;
	case BEGIN_NODE:
		if (!string_at(tree, at + 4, tree->structure_end, &bytes))
			return false;
		item->name = (const char *)tree->blob + at + 4;
		item->next = at + 4 + ((bytes + 1 + 3) & ~3u);
		return item->next <= tree->structure_end;
	case PROP:
		if (room < 8)
			return false;
		item->bytes = be32(tree->blob + at + 4);
		if (item->bytes > room - 8)
			return false;
		item->value = tree->blob + at + 12;
		item->next = at + 12 + ((item->bytes + 3) & ~3u);
		if (item->next > tree->structure_end)
			return false;
		at = be32(tree->blob + at + 8);
		if (at >= tree->strings_end - tree->strings)
			return false;
		at += tree->strings;
		if (!string_at(tree, at, tree->strings_end, &bytes))
			return false;
		item->name = (const char *)tree->blob + at;
		return true;
	default:
		return false;
	}
}

enum fdt_status fdt_size(const void *blob, uint32_t *bytes)
{
	if ((uint64_t)blob % 8)
		return FDT_UNALIGNED;
	if (be32((const uint8_t *)blob + H_MAGIC) != MAGIC)
		return FDT_MAGIC;
	*bytes = be32((const uint8_t *)blob + H_TOTALSIZE);
	if (*bytes < FDT_HEADER_BYTES + RESERVE_ENTRY_BYTES || *bytes > FDT_MAXIMUM)
		return FDT_SIZE;
	return FDT_OK;
}

/* Whether [offset, offset + bytes) lies behind the header and inside the blob. */
static bool is_inside(uint32_t total, uint32_t offset, uint32_t bytes)
{
	return offset >= FDT_HEADER_BYTES && offset <= total && bytes <= total - offset;
}

/* Walk the whole structure block: one root, balanced, properties before subnodes, END last. */
static enum fdt_status check_structure(const struct fdt *tree)
{
	struct item item;
	uint32_t at = tree->structure;
	unsigned depth = 0;
	bool root_seen = false, properties = false;

	for (;; at = item.next) {
		if (!item_at(tree, at, &item))
			return FDT_STRUCTURE;
		switch (item.token) {
		case NOP:
			continue;
		case BEGIN_NODE:
			if (depth == 0 && (root_seen || *item.name))
				return FDT_STRUCTURE;
			if (++depth > DEEPEST)
				return FDT_STRUCTURE;
			root_seen = true;
			properties = true;
			continue;
		case PROP:
			if (!properties)
				return FDT_STRUCTURE;
			continue;
		case END_NODE:
			if (depth == 0)
				return FDT_STRUCTURE;
			depth--;
			properties = false;
			continue;
		default: /* END */
			return depth == 0 && root_seen ? FDT_OK : FDT_STRUCTURE;
		}
	}
}

enum fdt_status fdt_open(struct fdt *tree, const void *blob)
{
	const uint8_t *header = blob;
	enum fdt_status status;
	uint32_t at, bytes;

	*tree = (struct fdt){.blob = blob};
	status = fdt_size(blob, &tree->bytes);
	if (status != FDT_OK)
		return status;
	if (be32(header + H_VERSION) < VERSION || be32(header + H_COMPATIBLE) < OLDEST_VERSION ||
	    be32(header + H_COMPATIBLE) > VERSION)
		return FDT_VERSION;

	at = be32(header + H_STRUCT);
	bytes = be32(header + H_STRUCT_SIZE);
	if (at % 4 || bytes % 4 || !is_inside(tree->bytes, at, bytes))
		return FDT_LAYOUT;
	tree->structure = at;
	tree->structure_end = at + bytes;

	at = be32(header + H_STRINGS);
	bytes = be32(header + H_STRINGS_SIZE);
	if (!is_inside(tree->bytes, at, bytes))
		return FDT_LAYOUT;
	tree->strings = at;
	tree->strings_end = at + bytes;

	at = be32(header + H_RESERVE);
	if (at % 8 || !is_inside(tree->bytes, at, RESERVE_ENTRY_BYTES))
		return FDT_LAYOUT;
	return check_structure(tree);
}

/* The first token inside the node that begins at `node`. */
static uint32_t inside(const struct fdt *tree, uint32_t node)
{
	struct item item = {0};

	while (item_at(tree, node, &item) && item.token == NOP)
		node = item.next;
	return item.next;
}

uint32_t fdt_next(const struct fdt *tree, uint32_t node, uint32_t child, const char **name)
{
	struct item item;
	unsigned depth = child == FDT_NONE ? 0 : 1;
	uint32_t at = inside(tree, child == FDT_NONE ? node : child);

	for (; item_at(tree, at, &item); at = item.next) {
		switch (item.token) {
		case BEGIN_NODE:
			if (depth == 0) {
				*name = item.name;
				return at;
			}
			depth++;
			break;
		case END_NODE:
			if (depth == 0)
				return FDT_NONE;
			depth--;
			break;
		case END:
			return FDT_NONE;
		}
	}
	return FDT_NONE;
}

/* Whether a node's name is `want` of `bytes` characters, with or without a unit address. */
static bool is_named(const char *name, const char *want, size_t bytes)
{
	size_t i;

	for (i = 0; i < bytes; i++)
		if (name[i] != want[i])
			return false;
	return name[i] == 0 || name[i] == '@';
}

enum fdt_status fdt_node(const struct fdt *tree, const char *path, uint32_t *node)
{
	uint32_t here = tree->structure;

	while (*path) {
		const char *want = ++path, *name;
		uint32_t child, found = FDT_NONE;

		while (*path && *path != '/')
			path++;
		for (child = fdt_next(tree, here, FDT_NONE, &name); child != FDT_NONE;
		     child = fdt_next(tree, here, child, &name)) {
			if (!is_named(name, want, (size_t)(path - want)))
				continue;
			if (found != FDT_NONE)
				return FDT_TWICE;
			found = child;
		}
		if (found == FDT_NONE)
			return FDT_MISSING;
		here = found;
	}
	*node = here;
	return FDT_OK;
}

enum fdt_status fdt_property(const struct fdt *tree, uint32_t node, const char *name,
			     const uint8_t **value, uint32_t *bytes)
{
	struct item item;
	bool found = false;
	uint32_t at;

	for (at = inside(tree, node); item_at(tree, at, &item); at = item.next) {
		if (item.token == NOP)
			continue;
		if (item.token != PROP)
			break;
		if (!equal(item.name, name, length(name) + 1))
			continue;
		if (found)
			return FDT_TWICE;
		found = true;
		*value = item.value;
		*bytes = item.bytes;
	}
	return found ? FDT_OK : FDT_MISSING;
}

enum fdt_status fdt_u32(const struct fdt *tree, uint32_t node, const char *name, uint32_t *value)
{
	const uint8_t *cells;
	uint32_t bytes;
	enum fdt_status status = fdt_property(tree, node, name, &cells, &bytes);

	if (status != FDT_OK)
		return status;
	if (bytes != 4)
		return FDT_VALUE;
	*value = be32(cells);
	return FDT_OK;
}

enum fdt_status fdt_u64(const struct fdt *tree, uint32_t node, const char *name, uint64_t *value)
{
	const uint8_t *cells;
	uint32_t bytes;
	enum fdt_status status = fdt_property(tree, node, name, &cells, &bytes);

	if (status != FDT_OK)
		return status;
	if (bytes != 8)
		return FDT_VALUE;
	*value = be64(cells);
	return FDT_OK;
}

enum fdt_status fdt_string(const struct fdt *tree, uint32_t node, const char *name,
			   const char **text)
{
	const uint8_t *value;
	uint32_t bytes;
	enum fdt_status status = fdt_property(tree, node, name, &value, &bytes);

	if (status != FDT_OK)
		return status;
	for (uint32_t i = 0; i < bytes; i++) {
		if (value[i])
			continue;
		if (i != bytes - 1)
			return FDT_VALUE;
		*text = (const char *)value;
		return FDT_OK;
	}
	return FDT_VALUE;
}

enum fdt_status fdt_memory(const struct fdt *tree, uint64_t *base, uint64_t *bytes)
{
	const uint8_t *reg;
	uint32_t node, length, address_cells, size_cells;
	enum fdt_status status;

	status = fdt_u32(tree, tree->structure, "#address-cells", &address_cells);
	if (status == FDT_OK)
		status = fdt_u32(tree, tree->structure, "#size-cells", &size_cells);
	if (status == FDT_OK)
		status = fdt_node(tree, "/memory", &node);
	if (status == FDT_OK)
		status = fdt_property(tree, node, "reg", &reg, &length);
	if (status != FDT_OK)
		return status;
	if (address_cells != 2 || size_cells != 2 || length != 16)
		return FDT_VALUE;
	*base = be64(reg);
	*bytes = be64(reg + 8);
	if (*bytes == 0 || *base + *bytes < *base)
		return FDT_VALUE;
	return FDT_OK;
}

enum fdt_status fdt_cpus(const struct fdt *tree, uint64_t *mpidr, unsigned room, unsigned *count)
{
	uint32_t cpus, cells, cpu, bytes;
	const uint8_t *reg;
	const char *name;
	enum fdt_status status;

	status = fdt_node(tree, "/cpus", &cpus);
	if (status == FDT_OK)
		status = fdt_u32(tree, cpus, "#address-cells", &cells);
	if (status != FDT_OK)
		return status;
	if (cells != 1 && cells != 2)
		return FDT_VALUE;

	*count = 0;
	for (cpu = fdt_next(tree, cpus, FDT_NONE, &name); cpu != FDT_NONE;
	     cpu = fdt_next(tree, cpus, cpu, &name)) {
		if (!is_named(name, "cpu", 3))
			continue;
		status = fdt_property(tree, cpu, "reg", &reg, &bytes);
		if (status != FDT_OK)
			return status;
		if (bytes != 4 * cells)
			return FDT_VALUE;
		if (*count < room)
			mpidr[*count] = cells == 1 ? be32(reg) : be64(reg);
		++*count;
	}
	return *count ? FDT_OK : FDT_MISSING;
}
