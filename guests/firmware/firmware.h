/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef FIRMWARE_H
#define FIRMWARE_H

#include <stdint.h>

/* Leave for `entry` with X0 = `tree`; enter.S. */
_Noreturn void enter_payload(uint64_t entry, uint64_t tree, uint64_t stack_end);

#endif
