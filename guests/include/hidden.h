/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Included before everything else: all symbols are inside one image, so that
 * the compiler reaches them relative to the PC and not through a table of
 * addresses, which somebody would have to relocate.
 */
#pragma GCC visibility push(hidden)
