"""What is in `deploy/`, as far as it can be checked without Docker: what it names exists in files and server."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

from loraflow.cli import app
from loraflow.serving.app import make_app
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import ServerConfig
from loraflow.serving.server import FLUSH_S
from loraflow.serving.service import Service
from tests.serving.worlds import tiny_fusion

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
# Those of Dockerfile's and compose's references that are used; a misspelt one is none of them.
INSTRUCTIONS = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"),
    *("RUN", "USER", "VOLUME", "WORKDIR"),
}
OF_COMPOSE = {"name", "services", "secrets", "volumes"}
OF_SERVICES = {
    *("build", "cap_drop", "command", "depends_on", "deploy", "environment", "image", "init", "ports", "read_only"),
    *("restart", "secrets", "security_opt", "stop_grace_period", "tmpfs", "volumes"),
}
# What whoever starts it puts there.
BROUGHT = {"./models", "./secrets/api_key", "./secrets/grafana_password"}


def dockerfile():
    """Its instructions, each with its words as they stand, by stage."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    stages = []
    for line in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        instruction, _, rest = line.partition(" ")
        assert instruction in INSTRUCTIONS, line
        if instruction == "FROM":
            stages.append([])
        stages[-1].append((instruction, rest.strip()))
    return stages


def check_command(words):
    """Every option of a `loraflow serve` exists."""
    known = {option for parameter in typer.main.get_command(app).commands["serve"].params for option in parameter.opts}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known | {"--help"}, given - known


def compose(name):
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def service():
    """One that has counted something of everything."""
    service = Service(Catalog(tiny_fusion(), "tiny", "tiny"))
    service.start()
    service.metrics.add_http("/v1/models", "GET", 200)
    service.metrics.requests.labels("tiny", "finished").inc()
    service.metrics.add_weights(["a"], torch.ones(2, 1))
    yield service
    service.engine.close()


# ---- The image -----------------------------------------------------------------------------------------------------


def test_the_image_has_two_stages_and_runs_as_nobody_much():
    build, final = dockerfile()
    assert build[0][1].endswith(" AS build")
    assert any(rest.startswith("--from=build ") for instruction, rest in final if instruction == "COPY")
    (user,) = [rest for instruction, rest in final if instruction == "USER"]
    assert int(user) > 0
    assert f"--uid {user}" in dict(final)["RUN"]
    for written in json.loads(dict(final)["VOLUME"]):
        assert written in dict(final)["RUN"]


def test_what_the_image_copies_and_installs_exists():
    (build, _) = dockerfile()
    copied = [shlex.split(rest)[:-1] for instruction, rest in build if instruction == "COPY"]
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for source in itertools.chain.from_iterable(copied):
        assert (ROOT / source).exists()
        assert f"!{source}" in kept
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"'\.\[(.*)\]'", "\n".join(rest for instruction, rest in build if instruction == "RUN"))
    assert set(extras[0].split(",")) <= project["optional-dependencies"].keys()
    assert set(extras[0].split(",")) == {"serve", "otel", "schema"}
    # Before the package is installed, whose version it is.
    words = [instruction for instruction, rest in build if rest == "SETUPTOOLS_SCM_PRETEND_VERSION" or "'.[" in rest]
    assert words == ["ARG", "RUN"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace("_", "-")
    for extra in extras[0].split(","):
        for requirement in project["optional-dependencies"][extra]:
            assert re.search(rf"^{requirement.partition('>')[0]}==", pinned, re.MULTILINE), requirement


def test_the_image_starts_the_server_and_asks_whether_it_is_ready(service):
    final = dict(dockerfile()[1])
    entry = json.loads(final["ENTRYPOINT"])
    assert entry[:2] == ["loraflow", "serve"]
    check_command(entry[2:] + json.loads(final["CMD"]))
    assert entry[entry.index("--port") + 1] == final["EXPOSE"]
    asked = json.loads(final["HEALTHCHECK"].partition(" CMD ")[2])
    compile(asked[2], "HEALTHCHECK", "exec")
    port, path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)'", asked[2]).groups()
    assert port == final["EXPOSE"]
    assert path in make_app(service).openapi()["paths"]


# ---- Compose -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_name_what_there_is(name):
    content, whole = compose(name), compose("compose.yaml")
    assert content.keys() <= OF_COMPOSE
    for service_name, found in content["services"].items():
        assert found.keys() <= OF_SERVICES, service_name
        declared = whole["services"][service_name]
        assert set(found.get("secrets", [])) <= whole["secrets"].keys()
        assert set(found.get("depends_on", [])) <= whole["services"].keys()
        for volume in found.get("volumes", []):
            source = volume.partition(":")[0]
            exists = source in whole["volumes"] or source in BROUGHT or (DEPLOY / source).exists()
            assert exists, volume
        text = json.dumps(found)
        assert set(re.findall(r"/run/secrets/(\w+)", text)) <= set(declared["secrets"])
    server = content["services"]["loraflow"]
    check_command(server["command"])
    args = server["build"].get("args", {})
    assert args.keys() <= {rest.partition("=")[0] for stage in dockerfile() for word, rest in stage if word == "ARG"}


def test_secrets_are_files_and_the_server_may_do_little():
    content = compose("compose.yaml")
    assert {secret["file"] for secret in content["secrets"].values()} <= BROUGHT
    server = content["services"]["loraflow"]
    assert "environment" not in server
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    assert all(port.startswith("127.0.0.1:") for one in content["services"].values() for port in one.get("ports", []))
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert int(server["stop_grace_period"].removesuffix("s")) > ServerConfig.drain_s + FLUSH_S
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"/deploy/models/", "/deploy/secrets/"} <= set(ignored)


def test_prometheus_asks_the_server_with_its_key():
    (job,) = compose("prometheus.yml")["scrape_configs"]
    services = compose("compose.yaml")["services"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in services
    assert port == dict(dockerfile()[1])["EXPOSE"]
    assert Path(job["authorization"]["credentials_file"]).name in services["prometheus"]["secrets"]


# ---- The dashboard -------------------------------------------------------------------------------------------------


def exported(service):
    """Labels by metric."""
    found = {}
    lines = re.findall(r"^([a-zA-Z0-9_:]+)(?:\{(.*)\})? \S+$", service.metrics.text().decode(), re.MULTILINE)
    for name, labels in lines:
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def used(expression):
    """Names of metrics in an expression, and labels that it names."""
    plain = re.sub(r'"[^"]*"', '""', expression)
    labels = set(re.findall(r"(\w+)\s*=~?\"\"|(\w+)!=\"\"", plain))
    labels = {one for pair in labels for one in pair if one}
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", plain):
        labels |= {label.strip() for label in group.split(",") if label.strip()}
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]| (?:by|on|group_left) \([^)]*\)", "", plain)
    functions = set(re.findall(r"([a-z_]+)(?= ?\()", bare))
    words = re.findall(r"(?<![\w.])[a-z_][a-z0-9_:]*", bare)
    return set(words) - functions, labels


def expressions():
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    for variable in board["templating"]["list"]:
        name, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]).groups()
        yield f"sum by ({label}) ({name})"


def test_the_dashboard_shows_what_is_exported(service):
    known = exported(service)
    seen = set()
    for expression in expressions():
        names, labels = used(expression)
        assert names, expression
        assert names <= known.keys(), expression
        for name in names:
            seen.add(name)
        assert labels <= set().union(*(known[name] for name in names)), expression
        assert expression.count("(") == expression.count(")")
    assert len(seen) > 15


def test_what_a_dashboard_may_not_show_is_found():
    assert used('sum by (le, x) (rate(vllm:no_such{model="a"}[5m])) / loraflow:b') == (
        {"vllm:no_such", "loraflow:b"},
        {"le", "x", "model"},
    )


def test_dashboards_ids_and_sources_are_those_that_grafana_is_given():
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    (source,) = compose("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    (provider,) = compose("grafana/provisioning/dashboards/loraflow.yaml")["providers"]
    mounts = [volume.split(":")[1] for volume in compose("compose.yaml")["services"]["grafana"]["volumes"]]
    assert any(Path(mount).parent == Path(provider["options"]["path"]) for mount in mounts)
