"""The notebooks run from the first cell to the last, and what they keep is of such a run."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.test_docs import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

LARGEST_BYTES = 300 * 1024
# As little as shows that every cell runs.
SMALL = {
    "fuse-two.ipynb": {"problems": 4, "examples": 8, "epochs": 1},
    "fifty-adapters.ipynb": {"problems": 2, "copies": 2},
    "paper-table.ipynb": {"limit": 4, "examples": 8, "epochs": 1, "tasks": ["zh-math"]},
}
FILES = sorted(notebooks.FOLDER.glob("*.ipynb"))


def test_every_notebook_is_known():
    assert [path.name for path in FILES] == sorted(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, tmp_path):
    pytest.importorskip("matplotlib")
    notebooks.execute(notebooks.FOLDER / name, tmp_path, **SMALL[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_outputs_are_those_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.cells[0].source.startswith("# ")
    assert path.stat().st_size < LARGEST_BYTES
    assert str(ROOT) not in path.read_text(encoding="utf-8")


def written(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


def test_a_parameter_takes_the_place_of_another(tmp_path):
    cells = [nbformat.v4.new_code_cell("count = 1\nname = 'a'"), nbformat.v4.new_code_cell("print(name * count)")]
    cells[0].metadata["tags"] = ["parameters"]
    path = written(tmp_path / "one.ipynb", *cells)
    assert notebooks.execute(path, tmp_path, count=3).cells[-1].outputs[0].text == "aaa\n"
    with pytest.raises(ValueError, match=r"The notebook has no parameter 'size'\. It has \['count', 'name'\]\."):
        notebooks.execute(path, tmp_path, size=3)
    path = written(tmp_path / "none.ipynb", nbformat.v4.new_code_cell("1"))
    with pytest.raises(ValueError, match=r"No cell of the notebook has the tag 'parameters'\."):
        notebooks.execute(path, tmp_path, size=3)


def test_an_error_ends_it(tmp_path):
    path = written(tmp_path / "bad.ipynb", nbformat.v4.new_code_cell("1 / 0"))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path, tmp_path)


def test_its_kernel_is_this_python(tmp_path):
    path = written(tmp_path / "who.ipynb", nbformat.v4.new_code_cell("import sys\nprint(sys.executable)"))
    assert notebooks.execute(path, tmp_path).cells[0].outputs[0].text.strip() == sys.executable
