#!/usr/bin/env bash
# Run the tests on the newest of every dependency, in an environment of its own, which is made first:
#   scripts/test_newest.sh [options of pytest]
# After `--fresh`, the first option, it is made anew, with what is newest by then. What is installed is printed.
# LORAFLOW_NEWEST has requirements that hold some packages back, to find which of them broke something, or to try a
# release between ("transformers==5.21.0"). LORAFLOW_NEWEST_VENV names another place than .venv-newest, PYTHON another
# interpreter. PyPI's newest torch for Linux brings gigabytes of CUDA libraries; pip takes the CPU build with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${LORAFLOW_NEWEST_VENV:-.venv-newest}

if [ "${1:-}" = --fresh ]; then
    shift
    rm -rf "$venv"
fi
if [ ! -e "$venv/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # Unquoted: several requirements are several words.
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --editable '.[test]' ${LORAFLOW_NEWEST:-}
    touch "$venv/.installed"
fi
"$venv/bin/python" -m pip freeze --exclude-editable
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 "$@"
