"""Execute the notebooks in docs/notebooks, each in an empty folder, and keep what they show.

```bash
python scripts/notebooks.py                 # all of them; the site shows what is kept
python scripts/notebooks.py fuse-two.ipynb  # one
```
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
CELL_TIMEOUT_S = 600
# What a kernel adds of its own (its version, the editor's modes) would change with every machine.
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

# Progress bars are drawn without widgets here, which tqdm and rich would say in a warning each.
_QUIET = 'ignore:IProgress not found,ignore:install "ipywidgets"'


def execute(path: Path, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """A notebook with the outputs of all its cells, run in a folder; the first error ends it.

    `parameters` replace what the cell with the tag "parameters" gives those names, as papermill does.

    Raises:
        ValueError: if the notebook has no such parameter.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        _replace(notebook, parameters)
    with tempfile.TemporaryDirectory() as sockets:
        # By sockets among this user's files: nothing else on the machine can talk to the kernel.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        client = NotebookClient(
            notebook,
            kernel,
            timeout=CELL_TIMEOUT_S,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(env={**os.environ, "PYTHONWARNINGS": _QUIET})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_empty(output)]
    notebook.metadata = nbformat.from_dict(_METADATA)
    return notebook


def _is_empty(output: nbformat.NotebookNode) -> bool:
    """Whether nothing is to be seen: a progress bar that was taken away when it was done."""
    return output.output_type == "display_data" and output.data.get("text/plain") == ""


def _replace(notebook: nbformat.NotebookNode, parameters: dict[str, Any]) -> None:
    for index, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", ()):
            known = {line.partition("=")[0].strip() for line in cell.source.splitlines() if "=" in line}
            if unknown := sorted(parameters.keys() - known):
                raise ValueError(f"The notebook has no parameter {unknown[0]!r}. It has {sorted(known)}.")
            source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source, id="replaced"))
            return
    raise ValueError("No cell of the notebook has the tag 'parameters'.")


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
