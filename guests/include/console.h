/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Text on the PL011. */
#ifndef CONSOLE_H
#define CONSOLE_H

#include <stddef.h>
#include <stdint.h>

/* Enable the transmitter and its FIFO. Once, before any text. */
void console_start(void);

void put_char(char character);
void put(const char *text);
void put_hex(uint64_t value);
void put_decimal(uint64_t value);
void put_signed(int64_t value);

/* At most `bytes` characters of text that somebody else wrote, up to its NUL; what is not
 * printable becomes '?', so that it cannot drive the terminal. */
void put_foreign(const char *text, size_t bytes);

#endif
