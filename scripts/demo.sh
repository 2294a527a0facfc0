#!/usr/bin/env bash
# Sets up and runs the demonstration: a plain and a distilled student on photographs of blood cells.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" ""
.venv/bin/yolo_cwd demo "$@"
