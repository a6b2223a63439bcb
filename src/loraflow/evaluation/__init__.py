"""Comparing methods: how answers are scored, and where generated code may run."""

from loraflow.evaluation.sandbox import ExecutionResult, Limits, check_available, run_many, run_tests
from loraflow.evaluation.scoring import SCORERS, Scorer, extract_code, get_scorer, last_number, same_number

__all__ = [
    "SCORERS",
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
