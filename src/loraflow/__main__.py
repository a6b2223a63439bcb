"""`python -m loraflow`, which launchers start: the `loraflow` command."""

from loraflow.cli import app

app(prog_name="loraflow")
