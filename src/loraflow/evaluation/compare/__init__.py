"""Methods x tasks x seeds: from a plan to a table with intervals and tests."""

from loraflow.evaluation.compare.comparison import Comparison, identities, open_comparison
from loraflow.evaluation.compare.options import Cluster, Options
from loraflow.evaluation.compare.plan import Plan, make_plan, read_plan, study_names
from loraflow.evaluation.compare.report import write_report
from loraflow.evaluation.compare.running import compare, rescore
from loraflow.evaluation.compare.store import Cell, Store

__all__ = [
    "Cell",
    "Cluster",
    "Comparison",
    "Options",
    "Plan",
    "Store",
    "compare",
    "identities",
    "make_plan",
    "open_comparison",
    "read_plan",
    "rescore",
    "study_names",
    "write_report",
]
