"""Adapters and fusions that come and go while a server answers."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from loraflow import FusedModel
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import LoraflowError
from loraflow.serving.admin import permitted
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.protocol import ApiError
from loraflow.serving.service import ServerConfig
from tests.serving.worlds import alone, call, serving, wait_for
from tests.tiny import edit_tensors, save_adapter, tiny_model

ADMIN = {"Authorization": "Bearer boss"}
LIMITS = EngineLimits(requests=8, batch_tokens=64, cache_tokens=4096, page_tokens=16)
QUESTION = load_task("zh-math").test[0].prompt


@pytest.fixture
def folder(tmp_path, small_world):
    """What may be loaded from: a copy of the small world's adapters, and its fusions with paths to them."""
    root = tmp_path / "allowed"
    shutil.copytree(adapter_paths()["math"].parent, root / "adapters")
    for name, directory in small_world.items():
        copy = shutil.copytree(directory, root / name)
        config = json.loads((copy / "fusion_config.json").read_text())
        for adapter in config["adapters"]:
            adapter["path"] = f"../adapters/{adapter['name']}"
        (copy / "fusion_config.json").write_text(json.dumps(config))
        (copy / "fusion.safetensors").write_bytes((directory / "fusion.safetensors").read_bytes())
    return root


@pytest.fixture
def server(folder, small_world):
    catalog = Catalog.open(None, None, {"layers": str(small_world["layers"])}, base_id="small")
    config = ServerConfig(limits=LIMITS, max_new_tokens=300, admin_keys=("boss",), load_from=(folder,))
    with serving(catalog, config) as running:
        yield running


def load(address, name, path, **headers):
    body = {"lora_name": name, "lora_path": str(path)}
    return call("POST", f"{address}/v1/load_lora_adapter", body, **(headers or ADMIN))


def unload(address, name, **headers):
    return call("POST", f"{address}/v1/unload_lora_adapter", {"lora_name": name}, **(headers or ADMIN))


def ask(address, model, tokens=12, **more):
    body = {"model": model, "prompt": QUESTION, "temperature": 0, "max_tokens": tokens, **more}
    return call("POST", f"{address}/v1/completions", body)


def text(address, model, **more):
    answer = ask(address, model, **more)
    assert answer.status == 200, answer.text
    return answer.json()["choices"][0]["text"]


def names(address):
    return [model["id"] for model in call("GET", f"{address}/v1/models").json()["data"]]


def expected(adapters, method, tokens=12):
    """What `generate` answers with these adapters alone."""
    paths = adapter_paths()
    model = FusedModel.from_adapters(base_path(), {name: paths[name] for name in adapters}, method)
    return answered(model, tokens)


def answered(model, tokens=12):
    ids = model.tokenizer(QUESTION)["input_ids"]
    return model.tokenizer.decode(alone(model, ids, new=tokens), skip_special_tokens=True)


class Long:
    """A request on its way, in a thread of its own, that takes a while."""

    def __init__(self, server, model, tokens=120):
        service, address = server
        before = service.engine.running
        self._thread = threading.Thread(target=lambda: setattr(self, "text", text(address, model, tokens=tokens)))
        self._thread.start()
        wait_for(lambda: service.engine.running > before or not self._thread.is_alive())

    def wait(self):
        self._thread.join(600)
        return self.text


# ---- Coming and going ----------------------------------------------------------------------------------------------


def test_adapters_and_fusions_come_and_go(server, folder, small_world):
    service, address = server
    layers = answered(FusedModel.from_pretrained(small_world["layers"]))
    assert names(address) == ["small", "zh-chat", "math", "layers"]
    assert text(address, "layers") == layers

    loaded = load(address, "code", "adapters/code")
    assert (loaded.status, loaded.json()["kind"]) == (200, "adapter")
    assert text(address, "code") == expected(["code"], "code")
    assert text(address, "layers") == layers
    mix = {"code": 0.5, "math": 0.75}
    assert text(address, "small", adapter_weights=mix) == expected(["math", "code"], mix)

    # Its third adapter comes with it; the others are there.
    assert load(address, "steps", folder / "steps").json()["adapters"] == ["code", "ru-chat", "math"]
    assert names(address)[-3:] == ["code", "ru-chat", "steps"]
    steps = answered(FusedModel.from_pretrained(small_world["steps"]))
    assert [text(address, name) for name in ("steps", "layers")] == [steps, layers]

    assert unload(address, "steps").json() == {"id": "steps", "object": "model", "deleted": True}
    assert unload(address, "ru-chat").status == 200
    assert service.catalog.model.adapter_names == ["zh-chat", "math", "code"]
    assert names(address) == ["small", "zh-chat", "math", "layers", "code"]
    assert text(address, "layers") == layers
    assert ask(address, "ru-chat").status == 404
    # The name is free for another adapter, whose directions are not those of the one before.
    arrow = {"fusion": {"method": "arrow"}}
    before = text(address, "small", **arrow)
    assert unload(address, "code").status == 200
    assert load(address, "code", "adapters/es-chat").status == 200
    assert text(address, "code") == expected(["es-chat"], "es-chat")
    assert text(address, "small", **arrow) == expected(["zh-chat", "math", "es-chat"], "arrow") != before


def test_running_requests_are_answered_as_they_were_asked(server, folder, small_world):
    service, address = server
    whole = answered(FusedModel.from_pretrained(small_world["layers"]), 120)
    running = Long(server, "layers")
    assert load(address, "a", "adapters/code").status == 200
    assert load(address, "arrows", "arrows").status == 200
    beside = Long(server, "arrows")
    # From the front of the model, so that all others change their places.
    assert unload(address, "layers").status == 200
    assert unload(address, "zh-chat").status == 200
    assert running.wait() == whole
    assert beside.wait() == answered(FusedModel.from_pretrained(small_world["arrows"]), 120)
    assert service.catalog.model.adapter_names == ["math", "a", "es-chat"]


def test_what_leaves_is_free_when_nobody_uses_it_any_more(server):
    service, address = server
    assert load(address, "code", "adapters/code").status == 200
    running = Long(server, "code", tokens=300)
    outcome = []
    leaving = threading.Thread(target=lambda: outcome.append(unload(address, "code").status))
    leaving.start()
    wait_for(lambda: "code" not in service.catalog.served)
    assert ask(address, "code").status == 404
    if service.engine.uses(["code"]):
        assert "code" in service.catalog.model.adapter_names
    assert running.wait() == expected(["code"], "code", 300)
    leaving.join(600)
    assert outcome == [200]
    assert service.catalog.model.adapter_names == ["zh-chat", "math"]


def test_all_adapters_may_leave(server):
    service, address = server
    for name in ("layers", "zh-chat", "math"):
        assert unload(address, name).status == 200
    assert names(address) == ["small"]
    assert service.catalog.model.adapter_names == []
    assert text(address, "small") == expected(["math"], "base")
    assert load(address, "math", "adapters/math").status == 200
    assert text(address, "math") == expected(["math"], "math")


def test_weights_are_those_of_the_requests_own_adapters(server, small_world):
    _, address = server
    wanted = {"return_fusion_weights": True}
    before = ask(address, "layers", **wanted).json()["choices"][0]["fusion_weights"]
    assert load(address, "code", "adapters/code").status == 200
    after = ask(address, "layers", **wanted).json()["choices"][0]["fusion_weights"]
    assert before["adapters"] == after["adapters"] == ["zh-chat", "math"]
    torch.testing.assert_close(torch.tensor(after["weights"]), torch.tensor(before["weights"]), rtol=0, atol=2e-5)
    metrics = call("GET", f"{address}/metrics").text
    assert 'loraflow:fusion_weight_total{adapter="math"}' in metrics
    assert 'loraflow:requests_total{model="layers",outcome="finished"}' in metrics
    for name in ("layers", "math"):
        assert unload(address, name).status == 200
    metrics = call("GET", f"{address}/metrics").text
    assert 'adapter="math"' not in metrics
    assert 'model="layers"' not in metrics
    assert 'loraflow:fusion_weight_total{adapter="zh-chat"}' in metrics


def test_no_series_comes_back_with_the_last_answer_of_what_was_unloaded(server):
    service, address = server
    running = Long(server, "layers", tokens=300)
    assert unload(address, "layers").status == 200
    assert service.engine.running
    running.wait()
    wait_for(lambda: not service.engine.running)
    metrics = call("GET", f"{address}/metrics").text
    assert 'model="layers"' not in metrics
    assert "vllm:request_success_total" in metrics


def test_loading_beside_requests_that_want_weights(server, small_world):
    _, address = server
    wanted = {"return_fusion_weights": "all"}
    expected = ask(address, "layers", **wanted).json()["choices"]
    seen, ended = [], threading.Event()

    def go():
        while not ended.is_set():
            seen.append(ask(address, "layers", **wanted))

    clients = [threading.Thread(target=go) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        for _ in range(12):
            assert load(address, "code", "adapters/code").status == 200
            assert unload(address, "code").status == 200
    finally:
        ended.set()
        for client in clients:
            client.join(600)
    assert len(seen) > 3
    for answer in seen:
        assert answer.status == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["text"] == expected[0]["text"]
        found, before = (torch.tensor(c["fusion_weights"]["weights"]) for c in (choice, expected[0]))
        torch.testing.assert_close(found, before, rtol=0, atol=2e-5)


# Every kind of model name, and every way in which a request may be weighed; no two of them answer alike.
KINDS = [
    ("small", {}),
    ("math", {}),
    ("zh-chat", {}),
    ("layers", {}),
    ("linears", {}),
    ("steps", {}),
    ("mix", {}),
    ("arrows", {}),
    ("small", {"adapter_weights": {"math": 0.7, "zh-chat": 0.6}}),
    ("math", {"adapter_weights": {"zh-chat": -0.8}}),
    ("layers", {"adapter_weights": {"zh-chat": 0.9, "math": 0.4}}),
    ("steps", {"fusion": {"method": "average"}}),
    ("layers", {"fusion": {"method": "qa-flora"}}),
    ("steps", {"fusion": {"method": "logo"}}),
    ("mix", {"fusion": {"method": "arrow", "options": {"top_k": 2}}}),
]


def told(answer):
    """The tokens of an answer, and how likely each was, which tells models apart that say the same."""
    assert answer.status == 200, answer.text
    logprobs = answer.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"]


def same(one, other):
    """Whether two answers have the same tokens, as likely but for the order of sums."""
    return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=2e-3)


def test_answers_stay_what_they_are_while_others_come_and_go(folder, small_world):
    catalog = Catalog.open(None, None, {name: str(path) for name, path in small_world.items()}, base_id="small")
    config = ServerConfig(limits=LIMITS, admin_keys=("boss",), load_from=(folder,))
    shutil.copytree(folder / "adapters" / "code", folder / "passing")
    edit_tensors(folder / "passing", lambda tensors: next(iter(tensors.values())).mul_(2))
    with serving(catalog, config) as (_, address):
        quiet = [told(ask(address, name, logprobs=0, **more)) for name, more in KINDS]
        for one, other in itertools.combinations(quiet, 2):
            assert not same(one, other)
        wrong, ended, count = [], threading.Event(), itertools.count()

        def go():
            while not ended.is_set():
                index = next(count) % len(KINDS)
                name, more = KINDS[index]
                answer = ask(address, name, logprobs=0, **more)
                if answer.status != 200 or not same(told(answer), quiet[index]):
                    wrong.append((name, more, answer.status, answer.text))

        clients = [threading.Thread(target=go) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(20):
                assert load(address, "passing", "passing").status == 200
                passing = told(ask(address, "passing", logprobs=0))
                assert not any(same(passing, one) for one in quiet)
                assert unload(address, "passing").status == 200
            wait_for(lambda: next(count) > 200)
        finally:
            ended.set()
            for client in clients:
                client.join(600)
    assert not wrong, (len(wrong), wrong[:3])


def test_a_request_that_waits_is_not_answered_by_another_adapter(server, monkeypatch):
    service, address = server
    load(address, "code", "adapters/code")
    weigher, reached, go_on, answers = service.catalog.weigher, threading.Event(), threading.Event(), []

    def slow(served, prompt):
        reached.set()
        go_on.wait(600)
        return weigher(served, prompt)

    monkeypatch.setattr(service.catalog, "weigher", slow)
    waiting = threading.Thread(target=lambda: answers.append(ask(address, "code")))
    waiting.start()
    reached.wait(600)
    assert unload(address, "code").status == 200
    assert load(address, "code", "adapters/es-chat").status == 200
    go_on.set()
    waiting.join(600)
    assert answers[0].status == 404
    assert "'code', or an adapter of its, was unloaded." in answers[0].json()["error"]["message"]


def test_a_request_that_waits_is_answered_whatever_else_comes_and_leaves(server, monkeypatch):
    service, address = server
    load(address, "code", "adapters/code")
    weights = {"adapter_weights": {"math": 0.7}}
    expected = text(address, "small", **weights)
    weigher, reached, go_on, answers = service.catalog.weigher, threading.Event(), threading.Event(), []

    def slow(served, prompt):
        found = weigher(served, prompt)
        reached.set()
        go_on.wait(600)
        return found

    monkeypatch.setattr(service.catalog, "weigher", slow)
    waiting = threading.Thread(target=lambda: answers.append(text(address, "small", **weights)))
    waiting.start()
    reached.wait(600)
    assert unload(address, "code").status == 200
    go_on.set()
    waiting.join(600)
    assert answers == [expected]


# ---- Who may, and what ---------------------------------------------------------------------------------------------


def test_without_an_admin_key_nothing_can_be_loaded(small_world):
    catalog = Catalog.open(None, None, {"layers": str(small_world["layers"])})
    with serving(catalog, ServerConfig(limits=LIMITS, api_keys=("user",))) as (_, address):
        for answer in (load(address, "x", "/"), unload(address, "layers"), load(address, "x", "/", Authorization="x")):
            assert answer.status == 403
            assert "the server was started without an admin key" in answer.json()["error"]["message"]
        user = {"Authorization": "Bearer user"}
        models = call("GET", f"{address}/v1/models", **user).json()["data"]
        assert "layers" in [model["id"] for model in models]


def test_only_the_admin_key_allows_it(server):
    _, address = server
    for headers in ({"Authorization": "Bearer user"}, {"Authorization": "Bearer "}, {"X-Other": "boss"}):
        for answer in (load(address, "x", "adapters/code", **headers), unload(address, "layers", **headers)):
            assert answer.status == 401
            assert "need the admin key" in answer.json()["error"]["message"]
    assert "layers" in names(address)


def test_only_allowed_folders(server, folder, tmp_path):
    _, address = server
    outside = shutil.copytree(folder / "adapters" / "code", tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    linked = folder / "linked-files"
    linked.mkdir()
    for file in outside.iterdir():
        (linked / file.name).symlink_to(file)
    shutil.copytree(folder / "steps", folder / "astray")
    config = json.loads((folder / "astray" / "fusion_config.json").read_text())
    config["adapters"][0]["path"] = str(outside)
    (folder / "astray" / "fusion_config.json").write_text(json.dumps(config))
    nowhere = ["/", "/etc", "..", "adapters/../../outside", outside, "link", "linked-files", "astray", "a\x00b"]
    for path in [*nowhere, "nothing", folder / "nothing", "user/repo", "~", "adapters/code/adapter_config.json"]:
        answer = load(address, "x", path)
        assert answer.status == 403, path
        assert "inside the folders that the server may load from" in answer.json()["error"]["message"]
    assert names(address) == ["small", "zh-chat", "math", "layers"]


def test_folders_may_be_links_themselves(folder, tmp_path):
    (tmp_path / "way").symlink_to(folder)
    assert permitted(Path("adapters/code"), [tmp_path / "way"]) == (folder / "adapters" / "code").resolve()
    assert permitted(tmp_path / "way" / "steps", [folder]) == (folder / "steps").resolve()
    with pytest.raises(ApiError):
        permitted(Path("adapters"), [])


def test_what_cannot_be_loaded_changes_nothing(server, folder):
    service, address = server
    before = text(address, "layers")
    other = tiny_model(vocab_size=259)
    save_adapter(other, folder / "of-another-base", seed=1)
    broken = shutil.copytree(folder / "adapters" / "code", folder / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    changed = shutil.copytree(folder / "steps", folder / "changed")
    shutil.copytree(folder / "adapters" / "ru-chat", folder / "ru")
    edit_tensors(folder / "ru", lambda tensors: next(iter(tensors.values())).mul_(2))
    config = json.loads((changed / "fusion_config.json").read_text())
    config["adapters"][1]["path"] = "../ru"
    (changed / "fusion_config.json").write_text(json.dumps(config))
    reads = shutil.copytree(folder / "steps", folder / "reads")
    config = json.loads((reads / "fusion_config.json").read_text())
    config["method"] = {"name": "centroid", "parameters": {"encoder": "/etc"}}
    (reads / "fusion_config.json").write_text(json.dumps(config))
    odd = shutil.copytree(folder / "steps", folder / "odd-name")
    config = json.loads((odd / "fusion_config.json").read_text())
    config["adapters"][1]["name"] = "ru\x1bchat"
    (odd / "fusion_config.json").write_text(json.dumps(config))
    cases = {
        ("ru-chat", "steps"): "The fusion 'ru-chat' has an adapter of the same name. Give it another.",
        ("x", "reads"): "The method 'centroid' reads another model (`encoder`='/etc')",
        ("x", "of-another-base"): "It was trained on another base",
        ("x", "broken"): "adapter_model.safetensors",
        ("x", "adapters"): "adapter_config.json",
        ("x", "changed"): "is not the one that the fusion 'x' was made with",
        ("layers", "adapters/code"): "There is a model 'layers' already. Unload it first",
        ("small", "adapters/code"): "There is a model 'small' already.",
        ("a/b", "adapters/code"): "The adapter name 'a/b' cannot be used",
        ("average", "adapters/code"): "The adapter name 'average' cannot be used",
        ("x" * 129, "adapters/code"): "(129 characters) cannot be used: it must have at most 128 characters, all of",
        ("a\nb", "adapters/code"): "The adapter name 'a\\nb' (3 characters) cannot be used",
        ("named", "odd-name"): "The adapter name 'ru\\x1bchat' (7 characters) cannot be used",
    }
    for (name, path), message in cases.items():
        answer = load(address, name, path)
        assert answer.status == 400, (name, path, answer.text)
        assert message in answer.json()["error"]["message"]
    for name, status, message in (
        ("zh-chat", 400, "The adapter 'zh-chat' is needed by 'layers'. Unload that first."),
        ("small", 400, "'small' is the base, which stays."),
        ("nobody", 404, "There is no model 'nobody'. Known: 'layers', 'math', 'small', 'zh-chat'."),
    ):
        answer = unload(address, name)
        assert (answer.status, message in answer.json()["error"]["message"]) == (status, True), answer.text
    assert names(address) == ["small", "zh-chat", "math", "layers"]
    assert service.catalog.model.adapter_names == ["zh-chat", "math"]
    assert text(address, "layers") == before


def test_a_key_and_folders_go_together(tmp_path):
    for config in ({"admin_keys": ("boss",)}, {"load_from": (tmp_path,)}):
        with pytest.raises(LoraflowError, match=r"needs both: an admin key, and folders to load from"):
            ServerConfig(**config)
