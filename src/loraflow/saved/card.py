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


def model_card(config: FusionConfig, learned: int) -> str:
    """The card's text, from a fusion's configuration and its number of learned values."""
    adapters = "\n".join(f"| `{a.name}` | `{a.path}` | {a.revision or '-'} |" for a in config.adapters)
    known = {key: value for key, value in (config.training or {}).items() if value is not None}
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in known.items()]
    return _CARD.format(
        base=config.base.path or "unknown",
        # The Hub takes ids of its own there, no paths.
        base_line=f"base_model: {config.base.path}\n" if config.base.path and config.base.path[0] != "." else "",
        count=len(config.adapters),
        version=config.loraflow_version,
        method=config.method.name,
        adapters=adapters,
        parameters=json.dumps(config.method.parameters, ensure_ascii=False),
        learned=learned,
        training=_TRAINING.format(rows="\n".join(rows)) if rows else "",
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
