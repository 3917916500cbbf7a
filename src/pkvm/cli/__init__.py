# SPDX-License-Identifier: GPL-2.0-or-later
"""The `pkvm` command: one verb, one module.

A verb's module has `configure(parser)`, which adds its options, and
`execute(args)`, which does the work and returns the exit status. It imports
what is heavy in `execute`: `pkvm --help` needs neither numpy nor Unicorn.
"""
