#!/usr/bin/env bash
# Sets up and runs the tests, on all cores; arguments go to pytest, such as: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" "[dev]"
.venv/bin/python -m pytest -q -n auto --dist worksteal "$@"
