# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines with a real kernel in protected mode, emulated or by way of ssh, and what they are made
of: Debian packages of another architecture as files, and initramfs archives.

Standard library only, and nothing else of pkvm: whoever wants a stock kernel uses it.
"""
