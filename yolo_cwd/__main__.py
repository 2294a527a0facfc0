# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m yolo_cwd` is the command `yolo_cwd`."""

import sys

from yolo_cwd.cli import main

if __name__ == "__main__":
    sys.exit(main())
