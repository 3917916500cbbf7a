# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine monitor: a board, loaders, a device tree, devices, and attempts on the guest.

Untrusted, like every VMM of a protected VM. It knows `pkvm.kvm` and nothing
below it, and so runs unchanged on a real kernel.
"""
