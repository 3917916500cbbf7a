/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The mailbox: a device of the VMM's board by which a guest and its VMM talk in
 * tests and in the demonstration. It stands for a paravirtual device's
 * registers; nothing in it is trusted by either side.
 *
 * 4 KiB at BOARD_MAILBOX: a bank of 256 bytes for each of 16 CPUs, at
 * MAILBOX_BANK * MPIDR_EL1.Aff0. Registers are 64 bits wide and accessed as
 * such. Every access is an MMIO exit, and the VMM acts before the access ends.
 *
 *   offset  name         write                          read
 *   0x00    COMMAND      the guest announces an event   next command (agent.h);
 *                        (MAILBOX_EVENT_*)              0: none now, ask again
 *   0x08    ARG0-ARG5    arguments of the event         arguments of the command
 *   0x38    STATUS       how the command ended: its     -
 *                        results are complete
 *   0x40    RESULT0-7    results of the command;        -
 *                        one not written is 0
 *   0x80    DATA0-15     -                              register values for the command
 *
 * A register with no use in a direction reads as 0 and ignores writes.
 */
#ifndef MAILBOX_H
#define MAILBOX_H

#define MAILBOX_BANK 0x100
#define MAILBOX_COMMAND 0x00
#define MAILBOX_ARG 0x08
#define MAILBOX_ARGS 6
#define MAILBOX_STATUS 0x38
#define MAILBOX_RESULT 0x40
#define MAILBOX_RESULTS 8
#define MAILBOX_DATA 0x80
#define MAILBOX_DATAS 16

/*
 * ARG0 = IPA of a page, ARG1 = its bytes, ARG2 = CRC-32 of its content, ARG3 = 1 if it was shared
 * by MEM_SHARE, 0 if sharing is not offered. The first half holds a greeting that ends with NUL;
 * while it handles this write the VMM puts a reply, ending with NUL, into the second half.
 */
#define MAILBOX_EVENT_SHARED 1
/* ARG0-ARG1 as before: the guest took the page back. */
#define MAILBOX_EVENT_UNSHARED 2
/* ARG0 = a number that the program chooses. */
#define MAILBOX_EVENT_NOTE 3

#endif
