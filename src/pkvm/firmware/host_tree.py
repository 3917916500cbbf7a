# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host's boot firmware tells the host kernel: the machine's device tree.

The RFC takes the guest firmware from the host's boot firmware (patch 3/4 of the
series): a reserved-memory node, compatible `linux,pkvm-guest-firmware-memory`,
`no-map`, names the memory that holds the image. `host_device_tree` writes that
tree for the machine; a caller may hand the machine another one.
"""

from __future__ import annotations

from pkvm import fdt

FIRMWARE_COMPATIBLE = "linux,pkvm-guest-firmware-memory"


def host_device_tree(
    ram: tuple[int, int], firmware: tuple[int, int] | None, carveout: tuple[int, int] | None
) -> bytes:
    """The host's flattened device tree. Each range is (base PA, bytes).

    `firmware` is the reserved-memory node of the guest firmware, `carveout` the memory that EL2
    keeps; None leaves the node out.
    """
    tree = fdt.Tree()
    root = tree.root
    root.set_u32("#address-cells", 2)
    root.set_u32("#size-cells", 2)
    root.set_strings("compatible", "pkvm,machine")
    memory = root.add(f"memory@{ram[0]:x}")
    memory.set_strings("device_type", "memory")
    memory.set_u64("reg", *ram)
    reserved = root.add("reserved-memory")
    reserved.set_u32("#address-cells", 2)
    reserved.set_u32("#size-cells", 2)
    reserved.set_empty("ranges")
    if firmware is not None:
        node = reserved.add(f"pkvm-guest-firmware@{firmware[0]:x}")
        node.set_strings("compatible", FIRMWARE_COMPATIBLE)
        node.set_u64("reg", *firmware)
        node.set_empty("no-map")
    if carveout is not None:
        node = reserved.add(f"hypervisor@{carveout[0]:x}")
        node.set_u64("reg", *carveout)
        node.set_empty("no-map")
    return fdt.build(tree)
