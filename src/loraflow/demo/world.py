"""Where the shipped base model and adapters of the small world lie."""

from __future__ import annotations

from pathlib import Path

BASE_NAME = "loraflow/small-world"
"""What the adapters call their base model; no such repository is needed, `base_path()` is the model."""

ADAPTERS: tuple[str, ...] = ("zh-chat", "es-chat", "ru-chat", "math", "code")

_DATA = Path(__file__).parent / "data"


def base_path() -> Path:
    """The folder of the base model and its tokenizer, for `from_pretrained`."""
    return _DATA / "base"


def adapter_paths() -> dict[str, Path]:
    """The folder of each of the five PEFT adapters, by name."""
    return {name: _DATA / "adapters" / name for name in ADAPTERS}
