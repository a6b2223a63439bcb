"""Tasks of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) on any fusion.

```python
from loraflow.evaluation.harness import evaluate_task

result = evaluate_task(model, "mgsm_direct_zh", limit=50)
print(result.metric, result.aggregate[result.metric])
```

lm-eval is imported when a task is first asked for.
"""

from __future__ import annotations

from typing import Any

from loraflow.evaluation.harness.evaluate import HarnessItem, HarnessResult, check_task, evaluate_task, rescore_task
from loraflow.evaluation.harness.finding import PAPER_TASKS
from loraflow.evaluation.harness.models import lm_classes

__all__ = ["PAPER_TASKS", "HarnessItem", "HarnessResult", "check_task", "evaluate_task", "rescore_task"]


def __getattr__(name: str) -> Any:
    """`FusionLM`, a fusion as a model for `lm_eval.simple_evaluate`: a class that exists where lm-eval is installed."""
    if name == "FusionLM":
        return lm_classes().FusionLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
