/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Bytes and strings; the compiler calls the first two by itself. */
#ifndef TEXT_H
#define TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *memset(void *to, int byte, size_t bytes);
void *memcpy(void *restrict to, const void *restrict from, size_t bytes);

/* Whether two byte strings are equal. */
bool equal(const void *left, const void *right, size_t bytes);
size_t length(const char *text);

/* CRC-32 as IEEE 802.3 and zlib have it. */
uint32_t crc32(const void *from, size_t bytes);

/* The n-th word of an endless, reproducible sequence that a seed starts (SplitMix64's mixing
 * function): what test patterns are made of. */
uint64_t pattern(uint64_t seed, uint64_t n);

#endif
