#!/usr/bin/env bash
# Sets up and runs the demonstration: teacher, plain student and distilled student on handwritten digits.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" ""
.venv/bin/yolo_cwd demo
