#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Be the command `yolo_cwd`, without the model that Ultralytics fetches to check mixed precision; bench_gpu.py runs it.

torchrun --nproc_per_node=1 scripts/bench_train.py train teacher=... student=... data=...
"""

import sys
from unittest.mock import patch

if __name__ == "__main__":
    from yolo_cwd.cli import main

    with patch("ultralytics.engine.trainer.check_amp", return_value=True):
        sys.exit(main(sys.argv[1:]))
