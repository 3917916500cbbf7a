# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-ins for tests."""
