# SPDX-License-Identifier: GPL-2.0-or-later
"""The device tree that the guest gets in X0: the board, the command line, the payload.

Node names, bindings and interrupts are those of QEMU's `virt` machine; the
bindings are the kernel's (Documentation/devicetree/bindings). `/config` tells
the firmware where the payload is, in the form that AVF's pvmfw has it
(kernel-address, kernel-size), and where it is entered; each is one 64-bit
number.
"""

from __future__ import annotations

from pkvm import fdt
from pkvm.vmm import board
from pkvm.vmm.board import Board
from pkvm.vmm.errors import LoadError
from pkvm.vmm.loader import Image, Segment

CLOCK_HZ = 24_000_000
"""What the UART's divisors are made from; nothing depends on it."""

_GIC_PHANDLE, _CLOCK_PHANDLE, _POOL_PHANDLE = 1, 2, 3

# An interrupt has three cells (bindings/interrupt-controller/arm,gic-v3.yaml): kind, number, and
# flags.
_SPI, _PPI = 0, 1
_LEVEL_HIGH = 4
_TIMER_PPIS = (13, 14, 11, 10)
"""Secure and non-secure physical, virtual, and hypervisor timer, in the binding's order."""


def build_device_tree(the_board: Board, image: Image, initrd: Segment | None = None) -> bytes:
    """The board's device tree, flattened. Raises LoadError if it outgrows its room."""
    tree = fdt.Tree()
    root = tree.root
    root.set_strings("compatible", "pkvm,virt")
    root.set_strings("model", "pkvm")
    root.set_u32("#address-cells", 2)
    root.set_u32("#size-cells", 2)
    if the_board.gic:
        root.set_u32("interrupt-parent", _GIC_PHANDLE)

    _add_chosen(root, the_board, initrd)
    _add_memory(root, the_board)
    _add_cpus(root, the_board)
    if the_board.gic:
        _add_interrupts(root, the_board)
    _add_devices(root, the_board)

    config = root.add("config")
    config.set_u64("kernel-address", image.base)
    config.set_u64("kernel-size", image.size)
    config.set_u64("kernel-entry", image.entry)

    blob = fdt.build(tree)
    if len(blob) > board.DTB_BYTES:
        raise LoadError(f"the device tree has {len(blob)} bytes: shorten the command line")
    return blob


def _add_chosen(root: fdt.Node, the_board: Board, initrd: Segment | None) -> None:
    chosen = root.add("chosen")
    chosen.set_strings("bootargs", the_board.command_line)
    chosen.set_strings("stdout-path", f"/pl011@{board.UART_BASE:x}")
    if initrd is not None:
        chosen.set_u64("linux,initrd-start", initrd.ipa)
        chosen.set_u64("linux,initrd-end", initrd.end)
    if the_board.rng_seed:
        chosen.properties["rng-seed"] = the_board.rng_seed
    if the_board.kaslr_seed is not None:
        chosen.set_u64("kaslr-seed", the_board.kaslr_seed)


def _add_memory(root: fdt.Node, the_board: Board) -> None:
    memory = root.add(f"memory@{board.RAM_BASE:x}")
    memory.set_strings("device_type", "memory")
    memory.set_u64("reg", board.RAM_BASE, the_board.ram_bytes)
    if the_board.bounce_bytes:
        reserved = root.add("reserved-memory")
        reserved.set_u32("#address-cells", 2)
        reserved.set_u32("#size-cells", 2)
        reserved.set_empty("ranges")
        pool = reserved.add(f"restricted-dma@{the_board.bounce_base:x}")
        pool.set_strings("compatible", "restricted-dma-pool")
        pool.set_u64("reg", the_board.bounce_base, the_board.bounce_bytes)
        pool.set_u32("phandle", _POOL_PHANDLE)


def _add_cpus(root: fdt.Node, the_board: Board) -> None:
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


def _add_interrupts(root: fdt.Node, the_board: Board) -> None:
    gic = root.add(f"intc@{board.GICD_BASE:x}")
    gic.set_strings("compatible", "arm,gic-v3")
    gic.set_u64(
        "reg",
        board.GICD_BASE, board.GICD_BYTES,
        board.GICR_BASE, board.GICR_BYTES * the_board.cpus,
    )  # fmt: skip
    gic.set_u32("#redistributor-regions", 1)
    gic.set_empty("interrupt-controller")
    gic.set_u32("#interrupt-cells", 3)
    gic.set_u32("#address-cells", 0)
    gic.set_u32("phandle", _GIC_PHANDLE)

    timer = root.add("timer")
    timer.set_strings("compatible", "arm,armv8-timer")
    timer.set_u32("interrupts", *(c for n in _TIMER_PPIS for c in (_PPI, n, _LEVEL_HIGH)))
    timer.set_empty("always-on")


def _add_devices(root: fdt.Node, the_board: Board) -> None:
    uart = root.add(f"pl011@{board.UART_BASE:x}")
    uart.set_strings("compatible", "arm,pl011", "arm,primecell")
    uart.set_u64("reg", board.UART_BASE, board.DEVICE_BYTES)

    mailbox = root.add(f"mailbox@{board.MAILBOX_BASE:x}")
    mailbox.set_strings("compatible", "pkvm,mailbox")
    mailbox.set_u64("reg", board.MAILBOX_BASE, board.DEVICE_BYTES)
    if not the_board.gic:
        return

    clock = root.add("apb-pclk")
    clock.set_strings("compatible", "fixed-clock")
    clock.set_u32("#clock-cells", 0)
    clock.set_u32("clock-frequency", CLOCK_HZ)
    clock.set_strings("clock-output-names", "clk24mhz")
    clock.set_u32("phandle", _CLOCK_PHANDLE)

    uart.set_u32("interrupts", _SPI, board.UART_SPI, _LEVEL_HIGH)
    uart.set_u32("clocks", _CLOCK_PHANDLE, _CLOCK_PHANDLE)
    uart.set_strings("clock-names", "uartclk", "apb_pclk")

    rtc = root.add(f"pl031@{board.RTC_BASE:x}")
    rtc.set_strings("compatible", "arm,pl031", "arm,primecell")
    rtc.set_u64("reg", board.RTC_BASE, board.DEVICE_BYTES)
    rtc.set_u32("interrupts", _SPI, board.RTC_SPI, _LEVEL_HIGH)
    rtc.set_u32("clocks", _CLOCK_PHANDLE)
    rtc.set_strings("clock-names", "apb_pclk")

    # Linux numbers the devices in the tree's order.
    for slot in sorted(the_board.virtio_slots):
        virtio = root.add(f"virtio_mmio@{board.virtio_base(slot):x}")
        virtio.set_strings("compatible", "virtio,mmio")
        virtio.set_u64("reg", board.virtio_base(slot), board.VIRTIO_STRIDE)
        virtio.set_u32("interrupts", _SPI, board.virtio_spi(slot), _LEVEL_HIGH)
        virtio.set_empty("dma-coherent")
        if the_board.bounce_bytes:
            virtio.set_u32("memory-region", _POOL_PHANDLE)
