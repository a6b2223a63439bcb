"""Wherever a fusion answers, it stops where its template ends a turn, and no answer has that end in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from lm_eval.api.instance import Instance
from transformers import GenerationConfig
from typer.testing import CliRunner

from loraflow import FitConfig, FusedModel, PromptFormat, training
from loraflow.cli import app
from loraflow.endings import Endings
from loraflow.errors import DataError, LoraflowError
from loraflow.evaluation.harness.models import lm_classes
from loraflow.evaluation.scoring import get_scorer
from loraflow.serving.catalog import Catalog
from loraflow.serving.config import EngineLimits
from loraflow.serving.service import ServerConfig
from tests.serving.worlds import DEADLINE_S, serving
from tests.tiny import CHATML, GEMMA, TURNS, byte_tokenizer, chat_tokenizer, save_adapter, writing_model

LONGEST = 9
EXAMPLES = [{"prompt": question, "completion": "ok"} for question in ("hi", "how?")]
RECIPE = FitConfig(max_steps=1, batch_size=1, gradient_accumulation=1, score_max_new_tokens=LONGEST)


@dataclasses.dataclass(frozen=True)
class World:
    """A base that writes `ok`, its template's end, and then for ever; two adapters, and a fusion fitted on them."""

    root: Path
    end: str
    token: int

    def source(self, *names: str) -> dict[str, str]:
        return {name: str(self.root / name) for name in names}

    @property
    def fusion(self) -> str:
        return str(self.root / "fusion")

    @property
    def sources(self) -> tuple[str, ...]:
        return ("--base", f"{self.root}/base", "--lora-modules", f"zh={self.root}/zh", f"math={self.root}/math")


@pytest.fixture(scope="module", params=TURNS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root, end = tmp_path_factory.mktemp("world"), request.param
    tokenizer = chat_tokenizer(end)
    base = writing_model(tokenizer, f"ok{end}x")
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("zh", "math")):
        save_adapter(base, root / name, ["q_proj", "v_proj"], seed=seed)
    lines = "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    (root / "data.jsonl").write_text(lines)
    made = World(root, end, tokenizer.convert_tokens_to_ids(end))
    model = FusedModel.from_adapters(root / "base", made.source("zh", "math"))
    result = training.fit(model, EXAMPLES, dev=EXAMPLES, config=RECIPE, score=get_scorer("exact-match"))
    assert result.dev_score == 1.0, "dev answers end too"
    model.save_pretrained(made.fusion)
    return made


@pytest.fixture
def model(world: World) -> FusedModel:
    return FusedModel.from_pretrained(world.fusion)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def new_tokens(model: FusedModel, **options: Any) -> list[int]:
    inputs = model.encode("hi")
    return model.generate(**inputs, max_new_tokens=LONGEST, **options)[0, inputs["input_ids"].shape[1] :].tolist()


# ---- In Python -----------------------------------------------------------------------------------------------------


def test_generate_stops(world: World, model: FusedModel) -> None:
    ok = model.tokenizer("ok")["input_ids"]
    assert new_tokens(model) == [*ok, world.token]
    assert new_tokens(model, num_beams=2)[:3] == [*ok, world.token]
    assert new_tokens(model, generation_config=GenerationConfig()) == [*ok, world.token]
    with model.using("base"):
        assert new_tokens(model) == [*ok, world.token]
    assert len(new_tokens(model, eos_token_id=2)) == LONGEST, "the caller's own"
    assert new_tokens(model, stop_strings=["o"]) == ok[:1]
    assert new_tokens(model, eos_token_id=None, stop_strings=["k"]) == ok


def test_ends_are_saved_and_loaded(world: World, model: FusedModel, tmp_path: Path) -> None:
    assert model.endings == Endings(token_ids=(2, world.token))
    more = FusedModel.from_pretrained(world.fusion, stop_strings=["k"])
    more.save_pretrained(tmp_path / "more")
    again = FusedModel.from_pretrained(tmp_path / "more")
    assert again.endings == Endings(token_ids=(2, world.token), stop=("k",))
    assert len(new_tokens(again)) == 2
    # Another format brings its own ends; what was asked for stays.
    again.prompt = PromptFormat(template="{prompt}\n")
    assert again.endings == Endings(token_ids=(2,), stop=("k",))
    again.set_prompt(PromptFormat())
    assert again.endings == model.endings


def test_a_fusion_of_an_earlier_version_gets_its_ends(world: World, model: FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "fusion_config.json"
    config = json.loads(path.read_text())
    del config["endings"], config["added_tokens"]
    path.write_text(json.dumps(config))
    assert FusedModel.from_pretrained(tmp_path / "old").endings == model.endings


def test_ends_are_those_of_the_examples(world: World) -> None:
    """A template that takes only conversations with three words in them says nothing of any other."""
    tokenizer = chat_tokenizer(world.end)
    picky = "{{ raise_exception('no') if 'three' not in messages[0]['content'] }}" + TURNS[world.end]
    prompt = PromptFormat(chat_template=picky)
    model = FusedModel.from_adapters(world.root / "base", world.source("zh"), tokenizer=tokenizer, prompt=prompt)
    assert model.endings.token_ids == (2,)
    model.fit([{"prompt": "one two three", "completion": "ok"}], config=RECIPE)
    assert model.endings.token_ids == (2, world.token)


def test_a_stop_string_that_cannot_be_used_leaves_the_base_as_it_was(world: World) -> None:
    tokenizer = chat_tokenizer(world.end)
    base = writing_model(tokenizer, "ok")
    for _ in range(2):
        with pytest.raises(LoraflowError, match="must be text, and not empty"):
            FusedModel.from_adapters(base, world.source("zh"), tokenizer=tokenizer, stop_strings=[""])


def test_tasks_of_the_harness_stop(world: World, model: FusedModel) -> None:
    lm = lm_classes().FusionLM(model, chat=True)
    text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    for until, answer in (([], "ok"), (["k", world.end], "o")):
        settings = {"until": until, "max_gen_toks": LONGEST}
        request = Instance("generate_until", {}, (text, settings), 0, ("task", 0, 1))
        assert lm.generate_until([request]) == [answer]


# ---- On the command line -------------------------------------------------------------------------------------------


def test_the_command_line_stops(world: World, tmp_path: Path) -> None:
    for opened in ((world.fusion,), world.sources):
        found = run("generate", *opened, "--prompt", "hi", "--max-new-tokens", str(LONGEST))
        assert found.stdout == "ok\n"
        shown = f"answers end at '</s>' (2), {world.end!r} ({world.token})"
        origin = "the fusion's own format" if opened == (world.fusion,) else "the base tokenizer's chat template"
        assert found.stderr.splitlines()[-1] == f"prompts: {origin}; {shown}"
        assert f"prompts: {origin}; {shown}" in run("info", *opened).stdout.replace("\n", " ").replace("  ", " ")
    assert run("generate", world.fusion, "--prompt", "hi", "--stop", "k").stdout == "o\n"
    data = ("--data", f"{world.root}/data.jsonl", "--max-new-tokens", str(LONGEST), "--stop", "zz", "--stop", "k")
    answers = [json.loads(line) for line in run("generate", world.fusion, *data).stdout.splitlines()]
    assert [answer["answer_text"] for answer in answers] == ["o", "o"]
    traced = run("trace", world.fusion, "--prompt", "hi", "--json", str(tmp_path / "trace.json"))
    assert traced.exit_code == 0
    assert json.loads((tmp_path / "trace.json").read_text())["tokens"][-1] == world.end


def test_a_given_template_goes_before_a_fusions_own(world: World, tmp_path: Path) -> None:
    other = GEMMA if TURNS[world.end] == CHATML else CHATML
    (tmp_path / "other.jinja").write_text(other)
    given = ("--chat-template", str(tmp_path / "other.jinja"), "--max-new-tokens", str(LONGEST))
    for opened in ((world.fusion,), world.sources):
        found = run("generate", *opened, "--prompt", "hi", *given)
        assert "that was given" in found.stderr
        # Its end is no token of this tokenizer's, and the model never writes it.
        assert found.stdout != "ok\n"
    plain = run("generate", world.fusion, "--prompt", "hi", "--prompt-template", "{prompt}\\n", "--stop", world.end)
    assert plain.stdout == "ok\n"


def test_fit_and_compare_stop(world: World, tmp_path: Path) -> None:
    recipe = ("--max-steps", "1", "--batch-size", "1", "--dev-metric", "exact-match", "--max-new-tokens", str(LONGEST))
    data = ("--data", f"{world.root}/data.jsonl", "--dev", f"{world.root}/data.jsonl")
    fitted = run("fit", *world.sources, *data, *recipe, "--stop", "\\n", "--output", str(tmp_path / "fusion"))
    assert "score 1.000" in fitted.stderr
    assert f"prompts: the base tokenizer's chat template; answers end at '</s>' (2), {world.end!r}" in fitted.stderr
    assert FusedModel.from_pretrained(tmp_path / "fusion").endings.stop == ("\n",)
    test = ("--test", f"{world.root}/data.jsonl", "--scorer", "exact-match", "--max-new-tokens", str(LONGEST))
    rows = ("--methods", "base", "average", "--fusions", str(tmp_path / "fusion"))
    for options, score in (((), 1.0), (("--stop", "k"), 0.0)):
        output = tmp_path / f"run{score}"
        run("compare", *rows, *test, *options, "--output", str(output), "--device", "cpu")
        report = json.loads((output / "report.json").read_text())
        assert [row["mean"] for row in report["rows"]] == [score] * 3
    test_rows = ("--fusions", str(tmp_path / "fusion"), world.fusion)
    refused = CliRunner().invoke(app, ["compare", *test_rows, *test, "--output", str(tmp_path / "b")])
    assert "were made with different stop strings" in refused.output


# ---- In the server -------------------------------------------------------------------------------------------------

CONFIG = ServerConfig(limits=EngineLimits(requests=4, batch_tokens=64, cache_tokens=2048, page_tokens=16))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[openai.OpenAI]:
    catalog = Catalog.open(None, world.source("zh"), {"fused": world.fusion}, base_id="base")
    with (
        serving(catalog, CONFIG) as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=DEADLINE_S) as client,
    ):
        yield client


def asked(client: openai.OpenAI, name: str, **options: Any) -> tuple[str, str, int]:
    settings = {"temperature": 0, "max_tokens": LONGEST, **options}
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], **settings)
    choice = answer.choices[0]
    return choice.message.content, choice.finish_reason, answer.usage.completion_tokens


@pytest.mark.parametrize("name", ["base", "zh", "fused"])
def test_the_server_stops(world: World, client: openai.OpenAI, name: str) -> None:
    assert asked(client, name) == ("ok", "stop", 3)
    assert asked(client, name, stop=["k"])[:2] == ("o", "stop")
    assert asked(client, name, stop=world.end) == ("ok", "stop", 3)


def test_the_server_refuses_stop_strings_that_would_end_nothing(world: World, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"has the special token .* in it") as error:
        asked(client, "fused", stop=[f"{world.end}\n"])
    assert error.value.param == "stop"


def test_each_served_model_is_asked_in_its_own_format(world: World, tmp_path: Path) -> None:
    other = GEMMA if TURNS[world.end] == CHATML else CHATML
    for name, template in (("own", TURNS[world.end]), ("other", other)):
        save_adapter(writing_model(chat_tokenizer(world.end), "ok"), tmp_path / name, ["q_proj"], seed=len(name))
        (tmp_path / name / "chat_template.jinja").write_text(template)
    base, given = world.root / "base", {"own": str(tmp_path / "own")}
    catalog = Catalog.open(base, given, base_id="base", stop_strings=["zz"])
    loaded = catalog.load("other", str(tmp_path / "other"))
    assert (loaded.prompt.chat_template, loaded.endings.stop) == (other, ("zz",))
    assert catalog.find("base").prompt.chat_template == TURNS[world.end]
    with pytest.raises(DataError, match="different chat templates"):
        Catalog.open(base, {**given, "other": str(tmp_path / "other")})
    plain = PromptFormat(template="Q: {prompt}\nA:")
    catalog = Catalog.open(base, {**given, "other": str(tmp_path / "other")}, base_id="base", prompt=plain)
    assert {served.prompt for served in catalog.served.values()} == {plain}


def test_the_server_refuses_tokens_that_its_tokenizer_lacks(world: World, tmp_path: Path) -> None:
    base = writing_model(chat_tokenizer(world.end), "ok")
    base.resize_token_embeddings(264)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("plain", "added"):
        save_adapter(base, tmp_path / name, ["q_proj"], seed=len(name))
    (tmp_path / "added" / "added_tokens.json").write_text(json.dumps({"[A]": 259}))
    catalog = Catalog.open(tmp_path / "base", {"plain": str(tmp_path / "plain")}, base_id="base")
    expected = (
        r"The adapter 'added' was made with the added token '\[A\]' \(259\), which the server's tokenizer does not"
    )
    with pytest.raises(LoraflowError, match=expected):
        catalog.load("added", str(tmp_path / "added"))
    assert list(catalog.served) == ["base", "plain"]
