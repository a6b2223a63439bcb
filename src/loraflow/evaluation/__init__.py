"""Comparing methods: how answers are scored, and where generated code may run."""

from loraflow.evaluation.sandbox import ExecutionResult, Limits, check_available, run_many, run_tests
from loraflow.evaluation.scoring import SCORERS, Scorer, extract_code, get_scorer, last_number, same_number

SETTINGS = {"small-world": "loraflow.demo.setting:small_world"}
"""The settings that come with loraflow, as entry points: what a name stands for is imported when it is asked for."""

__all__ = [
    "SCORERS",
    "SETTINGS",
    "ExecutionResult",
    "Limits",
    "Scorer",
    "check_available",
    "extract_code",
    "get_scorer",
    "last_number",
    "run_many",
    "run_tests",
    "same_number",
]
