#!/usr/bin/env bash
# Run the tests that touch transformers against another version of it than the pinned one, laid over .venv:
#   scripts/test_transformers.sh 5.23.0
# PYTHON names another interpreter than .venv's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?give a version of transformers, such as 5.23.0}
python=${PYTHON:-.venv/bin/python}
overlay=$(mktemp -d)
trap 'rm -rf "$overlay"' EXIT
# With its own dependencies: older ones need other versions of huggingface_hub, say. torch is none of them.
"$python" -m pip install --quiet --target "$overlay" "transformers==$version"
PYTHONPATH="$overlay" "$python" -c "import transformers; assert transformers.__version__ == '$version', transformers.__version__"
PYTHONPATH="$overlay" OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider \
    tests/core tests/test_model.py tests/training tests/cli
