# Makes the virtual environment in .venv (once) and installs the project into it; sourced by the scripts beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
installed=.venv/installed$extras
if [ ! "$installed" -nt pyproject.toml ]; then
    echo "Setting up .venv (the first time takes a few minutes) ..."
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extras"
    touch "$installed"
fi
