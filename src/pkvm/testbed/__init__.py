# SPDX-License-Identifier: GPL-2.0-or-later
"""Real Linux as files: Debian packages of another architecture, and initramfs archives.

Standard library only, and nothing else of pkvm: whoever wants a stock kernel uses it.
"""
