# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several folders share. What tests share otherwise is in `fakes`."""

pytest_plugins = [
    "fakes.board_fixtures",
    "fakes.cpu_fixtures",
    "fakes.linux_fixtures",
    "fakes.memory_fixtures",
]
