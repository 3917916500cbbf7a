/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A strict reader of flattened device trees, version 17 (Devicetree
 * Specification v0.4, chapter 5).
 *
 * The tree comes from a host that may be hostile: `fdt_open` walks all of it
 * once and refuses what is malformed, every later step checks its bounds again,
 * and a name or property found twice is refused rather than guessed at.
 */
#ifndef FDT_H
#define FDT_H

#include <stdbool.h>
#include <stdint.h>

#define FDT_MAXIMUM (2 * 1024 * 1024)
#define FDT_HEADER_BYTES 40

enum fdt_status {
	FDT_OK,
	FDT_UNALIGNED,
	FDT_MAGIC,
	FDT_VERSION,
	FDT_SIZE,
	FDT_LAYOUT,
	FDT_STRUCTURE,
	FDT_MISSING,
	FDT_TWICE,
	FDT_VALUE,
};

struct fdt {
	const uint8_t *blob;
	uint32_t bytes;
	uint32_t structure, structure_end;
	uint32_t strings, strings_end;
};

/* What is wrong, in words. */
const char *fdt_words(enum fdt_status status);

/* The size that a header claims: FDT_OK and *bytes if it is one of a tree of a possible size.
 * Reads FDT_HEADER_BYTES. */
enum fdt_status fdt_size(const void *blob, uint32_t *bytes);

/* Check all of a tree. Reads what `fdt_size` says. */
enum fdt_status fdt_open(struct fdt *tree, const void *blob);

/* Nodes are offsets into the blob. */
#define FDT_NONE 0

/* The node at an absolute path such as "/chosen"; a component without a unit address also matches
 * a name that has one. */
enum fdt_status fdt_node(const struct fdt *tree, const char *path, uint32_t *node);

/* The child after `child` (FDT_NONE: the first), FDT_NONE if there is no further one, and its name. */
uint32_t fdt_next(const struct fdt *tree, uint32_t node, uint32_t child, const char **name);

/* A property's value: a pointer into the blob, aligned to 4 bytes, and its length. */
enum fdt_status fdt_property(const struct fdt *tree, uint32_t node, const char *name,
			     const uint8_t **value, uint32_t *bytes);

/* A property of one (32-bit) or two (64-bit) big-endian cells, and no more. */
enum fdt_status fdt_u32(const struct fdt *tree, uint32_t node, const char *name, uint32_t *value);
enum fdt_status fdt_u64(const struct fdt *tree, uint32_t node, const char *name, uint64_t *value);

/* A property that is one string; *text ends with NUL. */
enum fdt_status fdt_string(const struct fdt *tree, uint32_t node, const char *name,
			   const char **text);

/* The one range of RAM, in bytes: /memory's reg, with two cells for address and for size. Refuses
 * an empty range and one that wraps. */
enum fdt_status fdt_memory(const struct fdt *tree, uint64_t *base, uint64_t *bytes);

/* The MPIDR affinity of each node "cpu" of /cpus, at most `room` of them; *count is how many
 * the tree has. */
enum fdt_status fdt_cpus(const struct fdt *tree, uint64_t *mpidr, unsigned room, unsigned *count);

#endif
