# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m pkvm` is the `pkvm` command."""

import sys

from pkvm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
