# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts this folder on the path: tests import `fakes`."""
