"""The model card of a fusion: what was fused, on what data, with what result."""

from __future__ import annotations

import json
from typing import Any

from loraflow.saved.records import FusionConfig

_CARD = """---
library_name: loraflow
{base_line}pipeline_tag: text-generation
tags: [lora, peft, lora-fusion, loraflow]
---

# A fusion of {count} LoRA adapters

Made with [loraflow](https://pypi.org/project/loraflow) {version} by the method `{method}`, on the base model `{base}`.

| adapter | source | revision |
|---|---|---|
{adapters}

Method parameters: `{parameters}`. Learned values: {learned:,}.

```python
from loraflow import FusedModel

model = FusedModel.from_pretrained("path/to/this/directory")
```
{training}"""

_TRAINING = """
## Training

| | |
|---|---|
{rows}
"""


_ON_TOP = """---
library_name: peft
{base_line}tags: [lora, peft, loraflow]
---

# A LoRA that was trained on top of a fusion

It learned, with [loraflow](https://pypi.org/project/loraflow) {version}, what a fusion of the adapters {below} by the
method `{method}` on the base model `{base}` was missing. PEFT opens it on that base, but without the fusion below it is
not what it was trained to be: load the fusion that it is a part of.
"""


def model_card(config: FusionConfig, learned: int) -> str:
    """The card's text, from a fusion's configuration and its number of learned values."""
    adapters = "\n".join(f"| `{a.name}` | `{a.path}` | {a.revision or '-'} |" for a in config.adapters)
    known = {key: value for key, value in (config.training or {}).items() if value is not None}
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in known.items()]
    return _CARD.format(
        base=config.base.path or "unknown",
        base_line=_base_line(config),
        count=len(config.adapters),
        version=config.loraflow_version,
        method=config.method.name,
        adapters=adapters,
        parameters=json.dumps(config.method.parameters, ensure_ascii=False),
        learned=learned,
        training=_TRAINING.format(rows="\n".join(rows)) if rows else "",
    )


def on_top_card(config: FusionConfig) -> str:
    """The card of the last adapter of a fusion, which was trained on top of the others."""
    return _ON_TOP.format(
        base=config.base.path or "unknown",
        base_line=_base_line(config),
        version=config.loraflow_version,
        below=", ".join(f"`{adapter.name}`" for adapter in config.adapters[:-1]),
        method=config.method.name,
    )


def _base_line(config: FusionConfig) -> str:
    # The Hub takes ids of its own there, no paths.
    return f"base_model: {config.base.path}\n" if config.base.path and config.base.path[0] != "." else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
