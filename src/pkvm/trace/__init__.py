# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of what happened: recorders for the events of `pkvm.events`."""
