/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "text.h"

void *memset(void *to, int byte, size_t bytes)
{
	uint8_t *out = to;

	while (bytes--)
		*out++ = (uint8_t)byte;
	return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
	uint8_t *out = to;
	const uint8_t *in = from;

	while (bytes--)
		*out++ = *in++;
	return to;
}

bool equal(const void *left, const void *right, size_t bytes)
{
	const uint8_t *a = left, *b = right;

	while (bytes--)
		if (*a++ != *b++)
			return false;
	return true;
}

size_t length(const char *text)
{
	size_t count = 0;

	while (text[count])
		count++;
	return count;
}

uint32_t crc32(const void *from, size_t bytes)
{
	const uint8_t *in = from;
	uint32_t crc = 0xFFFFFFFF;

	while (bytes--) {
		crc ^= *in++;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
	}
	return ~crc;
}

uint64_t pattern(uint64_t seed, uint64_t n)
{
	uint64_t z = seed + (n + 1) * 0x9E3779B97F4A7C15;

	z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
	z = (z ^ z >> 27) * 0x94D049BB133111EB;
	return z ^ z >> 31;
}
