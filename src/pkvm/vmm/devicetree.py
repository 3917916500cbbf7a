# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree that the guest gets in X0: the board, the command line, the payload.

`/config` tells the firmware where the payload is, in the form that AVF's
pvmfw has it (kernel-address, kernel-size), and where it is entered; each is
one 64-bit number.
"""

from __future__ import annotations

from pkvm import fdt
from pkvm.vmm import board
from pkvm.vmm.board import Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image


def build_device_tree(the_board: Board, image: Image) -> bytes:
    """The board's device tree, flattened. Raises LoadError if it outgrows its room."""
    tree = fdt.Tree()
    root = tree.root
    root.set_strings("compatible", "pkvm,virt")
    root.set_strings("model", "pkvm")
    root.set_u32("#address-cells", 2)
    root.set_u32("#size-cells", 2)

    chosen = root.add("chosen")
    chosen.set_strings("bootargs", the_board.command_line)
    chosen.set_strings("stdout-path", f"/pl011@{board.UART_BASE:x}")

    memory = root.add(f"memory@{board.RAM_BASE:x}")
    memory.set_strings("device_type", "memory")
    memory.set_u64("reg", board.RAM_BASE, the_board.ram_bytes)

    cpus = root.add("cpus")
    cpus.set_u32("#address-cells", 1)
    cpus.set_u32("#size-cells", 0)
    for index in range(the_board.cpus):
        cpu = cpus.add(f"cpu@{index:x}")
        cpu.set_strings("device_type", "cpu")
        cpu.set_strings("compatible", "arm,armv8")
        cpu.set_u32("reg", index)
        cpu.set_strings("enable-method", "psci")

    psci = root.add("psci")
    psci.set_strings("compatible", "arm,psci-1.0", "arm,psci-0.2")
    psci.set_strings("method", "hvc")

    uart = root.add(f"pl011@{board.UART_BASE:x}")
    uart.set_strings("compatible", "arm,pl011", "arm,primecell")
    uart.set_u64("reg", board.UART_BASE, board.DEVICE_BYTES)

    mailbox = root.add(f"mailbox@{board.MAILBOX_BASE:x}")
    mailbox.set_strings("compatible", "pkvm,mailbox")
    mailbox.set_u64("reg", board.MAILBOX_BASE, board.DEVICE_BYTES)

    config = root.add("config")
    config.set_u64("kernel-address", image.base)
    config.set_u64("kernel-size", image.size)
    config.set_u64("kernel-entry", image.entry)

    blob = fdt.build(tree)
    if len(blob) > board.DTB_BYTES:
        raise LoadError(f"the device tree has {len(blob)} bytes: shorten the command line")
    return blob
