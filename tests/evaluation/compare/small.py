"""The small world's model with a few of its problems, so that whole comparisons take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraflow.demo.samples import adapter_samples
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.evaluation.compare.plan import Plan, make_plan

ADAPTERS = ("zh-chat", "es-chat", "math")
QUICK = {"max_steps": 2, "batch_size": 2}
FLOW = {"method": "lora-flow", "fit": QUICK}


def write_setting(root: Path) -> dict[str, Any]:
    """Write four problems for each of two tasks, and what is learned from; gives the setting's fields."""
    tasks = {}
    for name in ("zh", "es"):
        drawn = load_task(f"{name}-math")
        parts = {"test": drawn.test[:4], "train": drawn.train[:6], "dev": drawn.dev[:2]}
        files = {}
        for part, problems in parts.items():
            records = [{"prompt": p.prompt, "completion": p.completion, "answer": p.answer} for p in problems]
            files[part] = _lines(root / f"{name}-{part}.jsonl", records)
        tasks[name] = {
            **files,
            "adapters": [f"{name}-chat", "math"],
            "scorer": "last-number",
            "max_new_tokens": 40,
            "problems": "math",
        }
    return {
        "base": str(base_path()),
        "adapters": {name: str(adapter_paths()[name]) for name in ADAPTERS},
        "adapter_data": {name: _lines(root / f"{name}.jsonl", adapter_samples(name, 4)) for name in ADAPTERS},
        "tasks": tasks,
    }


def small_plan(setting: dict[str, Any], methods: Any, **content: Any) -> Plan:
    """A plan on such a setting."""
    return make_plan({"setting": setting, "methods": methods, **content}, Path("plan.yaml"))


def _lines(path: Path, records: Any) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)
