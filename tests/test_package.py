"""What a package is made of, and what makes it: declared imports, named extras, workflows whose commands exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import loraflow
from loraflow import FusedModel
from loraflow.cli import app
from loraflow.demo.world import adapter_paths, base_path
from tests.test_docs import unknown_words

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Parts of a declared distribution that have one of their own, pinned by it.
PARTS = {"pydantic_core": "pydantic"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_commands, check_package = script("check_commands"), script("check_package")


def distribution(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imports():
    """Every package of somebody else's that the library imports anywhere, with the first file that does."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                found.setdefault(name.partition(".")[0], path)
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "loraflow"}}


def test_every_import_is_declared():
    extras = [
        entry
        for extra, entries in PROJECT["optional-dependencies"].items()
        if extra not in check_commands.FOR_DEVELOPERS
        for entry in entries
    ]
    declared = {distribution(entry) for entry in [*PROJECT["dependencies"], *extras]}
    homes = metadata.packages_distributions()
    for name, path in imports().items():
        # Where it is not installed here, it goes by its own name.
        owners = {distribution(owner) for owner in homes.get(PARTS.get(name, name), [name])}
        assert owners & declared, f"{path} imports {name}, of {owners}: pyproject.toml does not declare it"
    assert len(imports()) > 15


def test_the_version_is_that_of_the_installed_package(monkeypatch):
    assert loraflow.__version__ == metadata.version("loraflow")
    assert "__version__" in dir(loraflow)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert loraflow.__version__ == "0.0.0+unknown"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A fusion and data, as `loraflow demo` leaves them."""
    root = tmp_path_factory.mktemp("demo")
    adapters = {name: adapter_paths()[name] for name in ("zh-chat", "math")}
    FusedModel.from_adapters(base_path(), adapters, method="average").save_pretrained(root / "fusion")
    (root / "data").mkdir()
    for split in ("train", "dev"):
        (root / "data" / f"{split}.jsonl").write_text('{"prompt": "1 + 1", "completion": "2"}\n')
    return root


def test_each_extra_has_a_command_that_misses_it():
    assert set(check_commands.MISSING) == set(PROJECT["optional-dependencies"]) - check_commands.UNTRIED


# Runs `loraflow` as if the package that is named first were not installed.
HIDING = """
import sys
from importlib.machinery import PathFinder

hidden = sys.argv.pop(1)


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == hidden else PathFinder.find_spec(name, path, target)


sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from loraflow.cli import app

app()
"""


@pytest.mark.parametrize("extra", check_commands.MISSING)
def test_a_command_whose_extra_is_missing_names_it(extra, demo, tmp_path):
    module, command = check_commands.MISSING[extra]
    # In a process of its own: here the package may have been imported, and kept, by anything.
    words = [sys.executable, "-c", HIDING, module.partition(".")[0], *check_commands.words(command, demo, tmp_path)]
    path = str(tmp_path) if extra == "vllm" else os.environ["PATH"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PATH": path}
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1, said
    assert re.search(rf"pip install 'loraflow\[({extra}|{check_commands.FIRST.get(extra, extra)})\]'", said), said


@pytest.mark.parametrize("words", check_commands.commands(), ids=" ".join)
def test_every_command_explains_itself(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_a_release_wants_its_tag_its_files_and_its_changelog_to_agree():
    dated = "# Changelog\n\n## [1.2.0] - 2026-01-31\n"
    assert check_package.release_complaints("v1.2.0", "1.2.0", dated) == []
    (wrong,) = check_package.release_complaints("v1.2.0", "1.2.0.dev3+gabc", dated)
    assert wrong.startswith("The tag is v1.2.0, and what was built is 1.2.0.dev3+gabc.")
    (undated,) = check_package.release_complaints("v1.2.0", "1.2.0", "## [1.2.0] - unreleased\n")
    assert undated == "CHANGELOG.md has no section `## [1.2.0] - YYYY-MM-DD`. Date it."


def steps():
    """Every step of every workflow, with its job and file."""
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            yield from ((path, name, step) for step in job.get("steps", []))


def run_lines():
    return [(path, line) for path, _, step in steps() for line in step.get("run", "").splitlines()]


def check_command(line):
    """Complain about a shell line whose program, target, script or options are not there."""
    words = shlex.split(line)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(targets), line
    elif words[0] == "loraflow":
        assert not unknown_words(words[1:]), line
    elif words[0] == "python" and words[1].endswith(".py"):
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--")), line
    else:
        raise AssertionError(f"{line}: what CI runs is a target of the Makefile, a script, or loraflow itself")


def test_what_workflows_run_is_there():
    assert len(run_lines()) >= 5
    for _, line in run_lines():
        check_command(line)


@pytest.mark.parametrize(
    "line", ["make tests", "loraflow demos", "loraflow demo --fast", "python scripts/check_package.py --tags", "pytest"]
)
def test_what_is_not_there_is_seen(line):
    with pytest.raises(AssertionError):
        check_command(line)


def test_makefile_names_scripts_that_can_be_run():
    scripts = re.findall(r"^\t(scripts/\S+\.sh)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert scripts
    for name in scripts:
        assert (ROOT / name).stat().st_mode & 0o111, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_need_jobs_and_may_only_read(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True]
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"]), name
        if "uses" in job:
            assert True in yaml.safe_load((ROOT / job["uses"]).read_text(encoding="utf-8")), name
        else:
            assert job["timeout-minutes"], name


def test_downloads_are_of_what_was_uploaded():
    of = {"upload": set(), "download": set()}
    for _, _, step in steps():
        if found := re.match(r"actions/(upload|download)-artifact@", step.get("uses", "")):
            of[found[1]].add(step["with"]["name"])
    assert of["download"] <= of["upload"]


def test_pythons_that_are_tested_are_those_that_are_claimed():
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == claimed
    assert PROJECT["requires-python"] == f">={min(claimed, key=lambda v: int(v.split('.')[1]))}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda p: p.name)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    for field in form["body"]:
        assert {"type", "id", "attributes"} <= field.keys()
        assert field["attributes"]["label"]


def test_the_citation_says_what_the_project_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"]
    assert citation["abstract"] == PROJECT["description"] + "."
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["keywords"] == PROJECT["keywords"]
