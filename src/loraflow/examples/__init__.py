"""Examples from files, data sets and Python, checked and in one form."""

from loraflow.examples.base import Example, Fields, check_rows
from loraflow.examples.mixture import mix
from loraflow.examples.records import parse_example, parse_examples
from loraflow.examples.sources import Source, read_examples, read_records

__all__ = [
    "Example",
    "Fields",
    "Source",
    "check_rows",
    "mix",
    "parse_example",
    "parse_examples",
    "read_examples",
    "read_records",
]
