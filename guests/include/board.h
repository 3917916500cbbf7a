/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The board that the VMM builds, as guest (intermediate physical) addresses.
 *
 * Fixed, not taken from the device tree: the tree comes from a host that a
 * protected guest does not trust, and an address from it could point at the
 * guest's own code.
 */
#ifndef BOARD_H
#define BOARD_H

#define BOARD_GICD 0x08000000
#define BOARD_GICR 0x080A0000
#define BOARD_PL011 0x09000000
#define BOARD_MAILBOX 0x0B000000
#define BOARD_RAM 0x40000000
#define BOARD_IPA_END (UINT64_C(1) << 40)

#define PAGE_BYTES 4096

/* CPUs that a program here serves: those with MPIDR_EL1.Aff0 0-15 and higher levels 0. */
#define BOARD_CPUS 16

#endif
