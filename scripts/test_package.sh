#!/usr/bin/env bash
# Install the wheel of `dist/` as a user would, with nothing but what it declares, in an environment of its own, and try
# it there, away from the sources: import, every command's --help, what is said where an extra is missing, and
# `loraflow demo --quick`.
#   scripts/test_package.sh [wheel]
# LORAFLOW_PACKAGE_VENV names another place than .venv-package-user, PYTHON another interpreter. PyPI's torch for Linux
# brings gigabytes of CUDA libraries; pip takes the CPU build with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LORAFLOW_PACKAGE_VENV:-$root/.venv-package-user}
wheel=$(realpath "${1:-$(ls "$root"/dist/*.whl)}")

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "$wheel"
"$venv/bin/python" -m pip check
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH
"$venv/bin/python" -c 'import loraflow; print(loraflow.__version__, loraflow.__file__)'
time "$venv/bin/loraflow" demo --quick --output demo
"$venv/bin/python" "$root/scripts/check_commands.py" demo
