/* SPDX-License-Identifier: GPL-2.0-or-later */
/* PL011 UART (Arm DDI 0183), transmit only. */
#include "console.h"

#include <stdbool.h>

#include "board.h"
#include "io.h"
#include "text.h"

#define UARTDR (BOARD_PL011 + 0x00)
#define UARTFR (BOARD_PL011 + 0x18)
#define UARTLCR_H (BOARD_PL011 + 0x2C)
#define UARTCR (BOARD_PL011 + 0x30)

#define FR_TRANSMIT_EMPTY (1 << 7)
#define LCR_H_8_BITS (3 << 5)
#define LCR_H_FIFO (1 << 4)
#define CR_TRANSMIT_ENABLE (1 << 8)
#define CR_ENABLE (1 << 0)

/* Every revision's FIFO holds at least this many characters. */
#define FIFO_DEPTH 16

/* Characters that the FIFO certainly takes without being asked: asking costs as much as sending. */
static unsigned room;

void console_start(void)
{
	write32(UARTLCR_H, LCR_H_8_BITS | LCR_H_FIFO);
	write32(UARTCR, CR_TRANSMIT_ENABLE | CR_ENABLE);
}

void put_char(char character)
{
	if (room == 0) {
		while (!(read32(UARTFR) & FR_TRANSMIT_EMPTY))
			;
		room = FIFO_DEPTH;
	}
	room--;
	write32(UARTDR, (uint8_t)character);
}

void put(const char *text)
{
	while (*text)
		put_char(*text++);
}

void put_hex(uint64_t value)
{
	int shift = 60;

	put("0x");
	while (shift > 0 && value >> shift == 0)
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_char("0123456789abcdef"[value >> shift & 15]);
}

void put_decimal(uint64_t value)
{
	char digits[20];
	unsigned count = 0;

	do {
		digits[count++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (count)
		put_char(digits[--count]);
}

void put_signed(int64_t value)
{
	if (value < 0)
		put_char('-');
	put_decimal(value < 0 ? -(uint64_t)value : (uint64_t)value);
}

void put_foreign(const char *text, size_t bytes)
{
	for (size_t i = 0; i < bytes && text[i]; i++)
		put_char(text[i] >= ' ' && text[i] <= '~' ? text[i] : '?');
}
