"""The contract that all methods keep, how they are found by name, and methods of other packages."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from loraflow import FusedModel, LoraFlow, Static
from loraflow.core.lanes import learned_of
from loraflow.errors import FusionError, MethodError
from loraflow.methods import (
    METHODS,
    AdapterCore,
    Arrow,
    Average,
    Base,
    Centroid,
    Lag,
    LearnedStatic,
    Logo,
    LoraHub,
    LoraRetriever,
    Method,
    NormMax,
    Phatgoose,
    QaFlora,
    QueryMethod,
    Ramole,
    SpectR,
    get_method,
    make_method,
    method_names,
)
from loraflow.methods.base import Level, Mixing, Place
from loraflow.methods.checks import check_choice, check_count, check_positive, check_top_k, check_weights
from loraflow.training.learners import LEARNERS
from tests.tiny import random_adapter, random_ids, save_adapter, set_random_gates, tiny_model

NAMES = ("zh", "math", "code")
# Each method as users would write it, with nothing left as it is by default.
CHANGED = [
    Base(),
    Average(),
    Static([{"zh": 0.5}, {"math": -1}, {}]),
    LearnedStatic("module", {"zh": 0.5, "math": 0.25, "code": 0.25}, "softmax"),
    LoraHub("outputs", 7, 2.0, 0),
    QaFlora("js", "all", False, 1e-6),
    Logo("entropy", 2, "self_attn.k_proj"),
    Centroid(1, 0.5, 2, False),
    LoraRetriever("selection", 1, center=False, layer=1),
    Arrow(2, 0.5),
    SpectR(2, True, "softmax", 0.5),
    NormMax(2, "softmax", 0.5),
    Lag(2, {"tasks": ["math"], "knowledge": ["code", "zh"]}),
    Phatgoose(1),
    Ramole(3, 0.25, 2, 1),
    LoraFlow("module", 1.1, "zh", "normalized", "low-rank", 4, "sigmoid", 2),
    AdapterCore({"zh": 0.5}),
]
changed = pytest.mark.parametrize("method", CHANGED, ids=lambda method: method.name)


@pytest.fixture(scope="module")
def fused():
    base = tiny_model()
    adapters = {name: random_adapter(base, name, r=i + 1, seed=i) for i, name in enumerate(NAMES)}
    return FusedModel.from_adapters(base, adapters)


# ---- Every method --------------------------------------------------------------------------------------------------


def test_every_method_is_tested_here():
    assert [type(method) for method in CHANGED] == list(METHODS.values())
    assert [method.name for method in CHANGED] == list(METHODS)
    for method in CHANGED:
        # Another encoder is a model on disk, and has tests of its own; it alone reads instructions.
        fields = [field for field in dataclasses.fields(method) if field.name not in ("encoder", "instruction")]
        assert all(getattr(method, field.name) != _default(field) for field in fields), method


def _default(field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


@changed
def test_what_a_method_says_of_itself_is_valid(method):
    assert isinstance(method, Method)
    assert method.level in get_args(Level)
    assert (method.level == "query") == isinstance(method, QueryMethod)
    assert method.place in get_args(Place)
    assert method.mixing in get_args(Mixing)
    assert method.learns is None or method.learns in LEARNERS
    method.check(NAMES)
    from loraflow import FitConfig

    assert method.recipe.keys() <= FitConfig().__dict__.keys()


@changed
def test_parameters_survive_json(method):
    parameters = json.loads(json.dumps(method.parameters()))
    assert make_method(method.name, parameters) == method
    assert get_method(method.name, NAMES, parameters) == method


@changed
def test_methods_are_frozen(method):
    assert dataclasses.is_dataclass(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1


@changed
def test_gates_stand_where_they_should_and_learn_if_the_method_does(method, fused):
    with fused.using(method):
        place = "model" if method.level == "query" else method.place
        if method.name == "base":
            assert fused.gates == {}
        else:
            kept = ["model"] if method.reads_prompt and place != "model" else []
            assert list(fused.gates) == [*fused.attachment.sites[place], *kept]
        learned = [p for gate in fused.gates.values() for p in gate.parameters()]
        assert bool(learned) == (method.learns in ("gradient", "search", "experts", "together"))
        assert bool(learned_of(fused.gates)) == (method.learns is not None)
        assert all(parameter.requires_grad for parameter in learned)
        starts = method.start_weights(NAMES, "math")
        if starts is not None:
            assert len(starts) == 3
            for gate in fused.gates.values():
                gate.start_at(starts)


@torch.no_grad()
@changed
def test_weights_have_the_shape_of_the_contract(method, fused):
    with fused.using(method):
        if method.name == "base":
            return
        set_random_gates(fused)
        if method.learns == "samples" or (method.reads_prompt and method.learns):
            fused.gates["model"].set_samples(torch.randn(3, 2, 32).unbind())
        trace = fused.trace(random_ids())
        assert trace.weights.shape == (2, 9, 3, 3)
        assert trace.weights.isfinite().all()
        if method.level != "token":
            torch.testing.assert_close(trace.weights[:, :1].expand(-1, 9, -1, -1), trace.weights)
        if method.level == "query":
            assert fused.weigh(random_ids()).shape == (2, 3, 3)
        if method.level == "task":
            torch.testing.assert_close(trace.weights[0], trace.weights[1])


# ---- By name -------------------------------------------------------------------------------------------------------


def test_known_names_are_listed_and_the_nearest_is_guessed():
    known = ", ".join(map(repr, sorted(METHODS)))
    with pytest.raises(MethodError) as error:
        make_method("qa-flroa", {})
    assert str(error.value) == f"Unknown method 'qa-flroa'. Known: {known}. Did you mean 'qa-flora'?"
    with pytest.raises(MethodError, match=r"Unknown method 'phat'\. Known: .*'math', 'norm-max', 'phatgoose'.*'zh'"):
        get_method("phat", NAMES)
    with pytest.raises(MethodError, match=r"Unknown method 'mth'.*Did you mean 'math'"):
        get_method("mth", NAMES)


@changed
def test_an_unknown_parameter_is_named_with_the_known_ones(method):
    fields = sorted(field.name for field in dataclasses.fields(method))
    known = ", ".join(map(repr, fields)) or "none"
    with pytest.raises(MethodError, match=re.escape(f"{method.name!r} has no parameter 'x'. Known: {known}.")):
        make_method(method.name, {"x": 1})


def test_a_query_method_is_no_gate(fused):
    with fused.using("logo"), pytest.raises(MethodError, match="The method in use weighs a whole prompt"):
        fused.gates["model"](torch.randn(1, 2, 32))


# ---- Checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (
            lambda: check_weights([0.5], NAMES, "w"),
            '`w` (=[0.5]) must give weights by adapter name, such as {"zh": 0.5}.',
        ),
        (
            lambda: check_weights({"cod": 1}, NAMES, "w"),
            "`w` names the unknown adapter 'cod'. Known: 'code', 'math', 'z",
        ),
        (lambda: check_weights({"zh": "1"}, NAMES, "w"), "`w` gives adapter 'zh' the weight 1; it must be a finite nu"),
        (lambda: check_weights({"zh": float("inf")}, NAMES, "w"), "the weight inf; it must be a finite number."),
        (lambda: check_choice("c", ("ab", "cd"), "p"), "`p` is unknown: 'c'. Known: 'ab', 'cd'."),
        (
            lambda: check_choice("abc", ("ab", "cd"), "p"),
            "`p` is unknown: 'abc'. Known: 'ab', 'cd'. Did you mean 'ab'?",
        ),
        (lambda: check_choice(None, ("ab", "cd"), "p"), "`p` is unknown: None. Known: 'ab', 'cd'."),
        *(
            (lambda value=value: check_count(value, "p"), f"`p` (={value!r}) must be a whole number of at least 1.")
            for value in (0, 1.5, True, "1", None)
        ),
        (lambda: check_positive(0, "p"), "`p` (=0) must be a positive number."),
        (lambda: check_positive(float("nan"), "p"), "`p` (=nan) must be a positive number."),
        (lambda: check_positive(float("inf"), "p"), "`p` (=inf) must be a positive number."),
        (lambda: check_positive(True, "p"), "`p` (=True) must be a positive number."),
        (lambda: check_positive("1", "p"), "`p` (='1') must be a positive number."),
        (lambda: check_top_k(0, NAMES), "`top_k` (=0) must be between 1 and the number of adapters (=3)."),
        (lambda: check_top_k(4, NAMES), "`top_k` (=4) must be between 1 and the number of adapters (=3)."),
        (lambda: check_top_k("2", NAMES), "`top_k` (='2') must be between 1 and the number of adapters (=3)."),
        (lambda: Static([{"zh": 1}]).gate(_site(layers=2)), "`weights` is for 1 layers, but the base has 2."),
        (lambda: Static([{"zh": 1}, {"x": 1}]).check(NAMES), "`weights` names the unknown adapter 'x'."),
        (lambda: Static("zh").check(NAMES), "`weights` (='zh') must give weights by adapter name"),
        (lambda: Static().check(NAMES), "`static` needs `weights`, by adapter name."),
    ],
)
def test_checks_name_the_parameter_and_its_value(check, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        check()


def _site(layers):
    from loraflow.methods.base import Site

    return Site(NAMES, 8, layers)


def test_checks_let_pass_what_is_right():
    check_weights({"zh": 1, "math": -0.5}, NAMES, "w")
    check_weights({}, NAMES, "w")
    check_choice("ab", ("ab", "cd"), "p")
    check_positive(1e-9, "p")
    check_top_k(None, NAMES)
    check_top_k(3, NAMES)


# ---- Methods of other packages -------------------------------------------------------------------------------------

OUTSIDE = """
    from dataclasses import dataclass
    from typing import ClassVar

    import torch
    from torch import nn

    from loraflow import Method


    class Loudness(nn.Module):
        def __init__(self, adapters, loudness):
            super().__init__()
            self.by_adapter = nn.Parameter(torch.zeros(adapters))
            self.loudness = loudness

        def forward(self, x):
            return self.loudness * self.by_adapter


    @dataclass(frozen=True)
    class Shout(Method):
        loudness: float = 1.0

        name: ClassVar[str] = "shout"
        level: ClassVar[str] = "task"
        learns: ClassVar[str] = "gradient"

        @property
        def place(self):
            return "layer"

        def gate(self, site):
            return Loudness(len(site.adapters), self.loudness)


    class Whisper(Shout):
        name = "murmur"


    nothing = 1
"""
SCRIPT = """
    import sys

    import torch

    from loraflow import FusedModel
    from loraflow.methods import make_method, method_names

    base, a, b, fusion = sys.argv[1:]
    assert "shout" in method_names()
    model = FusedModel.from_adapters(base, {"a": a, "b": b}, make_method("shout", {"loudness": 2.0}))
    with torch.no_grad():
        for gate in model.gates.values():
            gate.by_adapter.copy_(torch.tensor([0.5, -0.25]))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    with model.using({"a": 1.0, "b": -0.5}):
        torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(fusion)
    again = FusedModel.from_pretrained(fusion)
    assert type(again.method).__module__ == "loud_methods" and again.method.loudness == 2.0
    assert torch.equal(again(ids).logits, expected)
    assert not torch.equal(FusedModel.from_adapters(base, {"a": a, "b": b}, "shout")(ids).logits, expected)
    print("as loud as before")
"""


def build_wheel(directory: Path) -> Path:
    """A wheel of an outside package, as any build backend would write it."""
    info = "loud_methods-1.0.dist-info"
    files = {
        "loud_methods.py": textwrap.dedent(OUTSIDE),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: loud-methods\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": textwrap.dedent("""
            [loraflow.methods]
            shout = loud_methods:Shout
            whisper = loud_methods:Whisper
            nothing = loud_methods:nothing
            absent = loud_methods:Absent
            broken = not_there_at_all:Shout
        """),
    }
    record = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    wheel = directory / "loud_methods-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def _digest(text):
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Where an outside package is installed, with methods good and bad, and a fusion saved with one of them."""
    pytest.importorskip("pip")
    directory = tmp_path_factory.mktemp("outside")
    wheel, packages = build_wheel(directory), directory / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(packages)]
    subprocess.run([*command, str(wheel)], check=True)
    return directory


@pytest.fixture
def installed(outside, monkeypatch):
    monkeypatch.syspath_prepend(str(outside / "packages"))
    yield outside
    sys.modules.pop("loud_methods", None)


def test_a_method_of_another_package_is_used_saved_and_loaded_by_name(outside):
    base = tiny_model()
    base.save_pretrained(outside / "base")
    paths = [save_adapter(base, outside / name, seed=seed) for seed, name in enumerate("ab")]
    search = os.pathsep.join(filter(None, [str(outside / "packages"), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(outside / "base"), *paths, str(outside / "fusion")],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "as loud as before"
    # Here the package is not installed.
    with pytest.raises(
        FusionError, match=r"cannot make: Unknown method 'shout'\..* Update loraflow, or install the method's package"
    ):
        FusedModel.from_pretrained(outside / "fusion")


def test_methods_of_other_packages_are_listed_after_the_librarys_own(installed):
    assert method_names() == [*METHODS, "absent", "broken", "nothing", "shout", "whisper"]
    method = get_method("shout", NAMES, {"loudness": 3.0})
    assert (method.name, method.loudness) == ("shout", 3.0)
    with pytest.raises(MethodError, match=r"'shout' has no parameter 'loud'\. Known: 'loudness'"):
        get_method("shout", NAMES, {"loud": 3.0})
    with pytest.raises(MethodError, match="Did you mean 'shout'"):
        get_method("shot", NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "broken",
            "The method 'broken' of the package 'loud-methods' cannot be imported: No module named 'not_there_at_all'",
        ),
        ("absent", "The method 'absent' of the package 'loud-methods' cannot be imported: "),
        (
            "nothing",
            "The entry point 'nothing' of the package 'loud-methods' is loud_methods:nothing, which is no method of "
            "that name. It must be a subclass of `loraflow.Method` whose `name` is the entry point's.",
        ),
        ("whisper", "is loud_methods:Whisper, which is no method of that name."),
    ],
)
def test_entry_points_that_lead_nowhere_are_named_with_their_package(installed, name, expected):
    with pytest.raises(MethodError, match=re.escape(expected)):
        get_method(name, NAMES)


def test_a_library_method_cannot_be_taken_over(installed, tmp_path, monkeypatch):
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loraflow.methods]\naverage = loud_methods:Shout\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_method("average", {}) == Average()
    assert method_names().count("average") == 1


def test_a_gate_of_the_wrong_shape_is_named(fused):
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.ones(5, 3)

    @dataclasses.dataclass(frozen=True)
    class Odd(Average):
        def gate(self, site):
            return Wrong()

    with fused.using("average"):
        fused.attachment.install(Odd(), {"layers.1": Wrong()})
        with pytest.raises(
            MethodError, match=r"A gate of decoder layer 1 gave weights of shape \(5, 3\) for inputs of"
        ):
            fused(random_ids())
