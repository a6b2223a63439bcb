"""What adapters bring of a tokenizer: used where they agree, named where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraflow import FusedModel, PromptFormat
from loraflow.adapters import AdapterSource
from loraflow.bases import Beside, TokenRecord, choose, read_beside, with_tokens
from loraflow.errors import DataError
from loraflow.training import FitConfig, finetune
from tests.tiny import CHATML, GEMMA, byte_tokenizer, chat_tokenizer, random_adapter, save_adapter, tiny_model

TOKENS = {"<|im_end|>": 259, "<|im_start|>": 260}
ROWS = 264


def place(folder: Path, name: str, **files: Any) -> AdapterSource:
    """A directory with files, by their names without endings; texts as they are, all else as JSON."""
    directory = folder / name
    directory.mkdir()
    for stem, content in files.items():
        ending = ".jinja" if stem == "chat_template" else ".json"
        (directory / f"{stem}{ending}").write_text(content if isinstance(content, str) else json.dumps(content))
    return AdapterSource(str(directory))


def chosen(sources: Any, tokenizer: Any = None, prompt: PromptFormat | None = None, rows: int = ROWS) -> Any:
    return choose(prompt or PromptFormat(), tokenizer or chat_tokenizer(template=None), sources, rows)


# ---- Reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        ({"chat_template": CHATML}, {"default": CHATML}),
        ({"chat_template": CHATML + "\n"}, {"default": CHATML}),
        ({"tokenizer_config": {"chat_template": GEMMA}}, {"default": GEMMA}),
        ({"chat_template": CHATML, "tokenizer_config": {"chat_template": GEMMA}}, {"default": CHATML}),
        ({"tokenizer_config": {"chat_template": None}}, {}),
        ({"tokenizer_config": {"chat_template": " "}}, {}),
        ({"tokenizer_config": "\ufeff" + json.dumps({"chat_template": GEMMA})}, {"default": GEMMA}),
        ({"tokenizer_config": {"chat_template": [{"name": "tools", "template": GEMMA}]}}, {"tools": GEMMA}),
    ],
)
def test_a_template_stands_in_a_file_or_in_the_configuration(tmp_path: Path, files: Any, templates: Any) -> None:
    assert read_beside(place(tmp_path, "a", **files)) == Beside(templates)


def test_further_templates_stand_in_a_folder(tmp_path: Path) -> None:
    source = place(tmp_path, "a", chat_template=CHATML)
    (Path(source.path) / "additional_chat_templates").mkdir()
    (Path(source.path) / "additional_chat_templates" / "tools.jinja").symlink_to("/nowhere")
    assert set(read_beside(source).templates) == {"default", "tools"}
    with pytest.raises(DataError, match=r"'zh' brings several chat templates \(default, tools\)\. Give one as"):
        chosen({"zh": source})


def test_added_tokens_stand_in_three_files(tmp_path: Path) -> None:
    decoder = {str(token): {"content": text, "special": True} for text, token in TOKENS.items()}
    expected = {text: TokenRecord(id=token, special=True) for text, token in TOKENS.items()}
    assert read_beside(place(tmp_path, "new", tokenizer_config={"added_tokens_decoder": decoder})).tokens == expected
    assert read_beside(place(tmp_path, "old", added_tokens=TOKENS)).tokens == expected
    chat_tokenizer().save_pretrained(tmp_path / "whole")
    whole = read_beside(AdapterSource(str(tmp_path / "whole")))
    assert whole.templates == {"default": CHATML}
    assert {text: token.id for text, token in whole.tokens.items()} == {"<pad>": 0, "<s>": 1, "</s>": 2, **TOKENS}
    assert not read_beside(AdapterSource("nowhere")).tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer_config\.json beside an adapter: Invalid JSON: .* Restore or remove it"),
        ("[]", r"tokenizer_config\.json beside an adapter: Input should be an object"),
        ("[" * 10_000, r"tokenizer_config\.json beside an adapter: Invalid JSON: recursion limit exceeded"),
        ('{"added_tokens_decoder": {"x": {}}}', r"beside an adapter: `added_tokens_decoder\.x\..*`: "),
        ('{"chat_template": 3}', r"beside an adapter: `chat_template\.str`: Input should be a valid string"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    source = place(tmp_path, "a", tokenizer_config=content)
    with pytest.raises(DataError, match=message):
        read_beside(source)
    (Path(source.path) / "chat_template.jinja").write_bytes(b"\xff")
    (Path(source.path) / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"chat_template\.jinja beside an adapter is no UTF-8 text"):
        read_beside(source)


# ---- Templates -----------------------------------------------------------------------------------------------------


def test_adapters_that_agree_bring_their_template(tmp_path: Path) -> None:
    sources = {
        "zh": place(tmp_path, "zh", chat_template=CHATML),
        "none": place(tmp_path, "none"),
        "math": place(tmp_path, "math", tokenizer_config={"chat_template": CHATML}),
    }
    choice = chosen(sources)
    assert choice.prompt == PromptFormat(chat_template=CHATML)
    assert choice.origin == "the chat template of the adapters 'zh' and 'math'"
    asked = chosen(sources, chat_tokenizer(template=GEMMA), PromptFormat(system_prompt="Be brief."))
    assert asked.prompt == PromptFormat(chat_template=CHATML, system_prompt="Be brief.")
    assert asked.origin == "the chat template of the adapters 'zh' and 'math', which is not the base's"
    assert chosen({"zh": sources["zh"]}, chat_tokenizer()).origin == "the base tokenizer's chat template"


def test_what_is_given_goes_before_what_adapters_bring(tmp_path: Path) -> None:
    sources = {"zh": place(tmp_path, "zh", chat_template=CHATML), "es": place(tmp_path, "es", chat_template=GEMMA)}
    for prompt, kind in (
        (PromptFormat(chat_template=GEMMA), "chat"),
        (PromptFormat(template="Q: {prompt}"), "plain"),
    ):
        choice = chosen(sources, prompt=prompt)
        assert (choice.prompt, choice.origin) == (prompt, f"the {kind} template that was given")


def test_where_adapters_bring_none_the_tokenizers_is_taken(tmp_path: Path) -> None:
    sources = {"zh": place(tmp_path, "zh")}
    assert chosen(sources, chat_tokenizer()).origin == "the base tokenizer's chat template"
    assert chosen(sources).origin == "no chat template: plain text"
    assert choose(PromptFormat(), None, sources, ROWS).origin == "no tokenizer"
    assert chosen(sources).prompt == PromptFormat()


def test_adapters_that_disagree_are_named(tmp_path: Path) -> None:
    sources = {
        "zh": place(tmp_path, "zh", chat_template=CHATML),
        "math": place(tmp_path, "math", chat_template=CHATML),
        "es": place(tmp_path, "es", chat_template=GEMMA),
    }
    expected = (
        r"different chat templates\. One: 'zh' and 'math'; another: 'es'\. Give the one to use as `chat_template="
    )
    with pytest.raises(DataError, match=expected):
        chosen(sources)


# ---- Tokens --------------------------------------------------------------------------------------------------------


def test_tokens_that_the_base_lacks_are_added(tmp_path: Path) -> None:
    sources = {"a": place(tmp_path, "a", added_tokens=TOKENS), "b": place(tmp_path, "b", added_tokens=TOKENS)}
    plain = byte_tokenizer()
    tokens = chosen(sources, plain).tokens
    assert {text: token.id for text, token in tokens.items()} == TOKENS
    extended = with_tokens(plain, tokens)
    assert extended("a<|im_end|>")["input_ids"][-1] == 259
    assert len(plain) == 259, "the tokenizer that was given stays"
    assert with_tokens(extended, tokens) is extended
    assert chosen(sources, extended).tokens == {}


@pytest.mark.parametrize("text", ["[PAD]", "</s>"])
def test_a_token_that_cannot_be_had_matters_where_a_template_writes_it(tmp_path: Path, text: str) -> None:
    """`[PAD]` beyond the base's rows is what many adapters' tokenizers have."""
    padded = {"zh": place(tmp_path, "zh", added_tokens={text: ROWS}, chat_template=CHATML)}
    assert chosen(padded).tokens == {}
    written = {"zh": place(tmp_path, "es", added_tokens={text: ROWS}, chat_template=CHATML + text)}
    there = "has it as 2" if text == "</s>" else "has no room there"
    expected = rf"with the token .* as 264, which the template writes, and the base's tokenizer {there}; .* 264 tokens"
    with pytest.raises(DataError, match=expected):
        chosen(written)


def test_a_token_behind_a_gap_cannot_be_had(tmp_path: Path) -> None:
    sources = {"zh": place(tmp_path, "zh", added_tokens={"[A]": 261, "[C]": 263})}
    assert list(chosen(sources).tokens) == ["[A]"]
    with pytest.raises(DataError, match=r"the token '\[C\]' as 263, which the template writes"):
        chosen(sources, prompt=PromptFormat(template="[C]{prompt}"))


@pytest.mark.parametrize("other", [{"[A]": 262}, {"[B]": 261}])
def test_adapters_that_disagree_on_tokens_are_named(tmp_path: Path, other: Any) -> None:
    sources = {"zh": place(tmp_path, "zh", added_tokens={"[A]": 261}), "es": place(tmp_path, "es", added_tokens=other)}
    expected = r"The adapter 'es' was trained with the token '.*' as \d+, and the adapter 'zh' with '\[A\]' as 261"
    with pytest.raises(DataError, match=expected):
        chosen(sources)


def test_another_tokenizer_may_have_no_room_for_a_token() -> None:
    expected = r"The token '\[A\]' must be 300, and is 259 in this tokenizer\. Give the tokenizer .* as `tokenizer="
    with pytest.raises(DataError, match=expected):
        with_tokens(byte_tokenizer(), {"[A]": TokenRecord(id=300)})


# ---- Fusions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A base without a chat template, and two adapters that were trained with ChatML's and its tokens."""
    base = tiny_model(vocab_size=ROWS, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("zh", "math")):
        save_adapter(base, tmp_path / name, seed=seed)
        chat_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def adapters(world: Path) -> dict[str, str]:
    return {name: str(world / name) for name in ("zh", "math")}


def test_a_fusion_asks_as_its_adapters_were_trained_and_is_saved_with_that(world: Path) -> None:
    model = FusedModel.from_adapters(world / "base", adapters(world), "average")
    assert model.prompt_origin == "the chat template of the adapters 'zh' and 'math'"
    assert model.endings.token_ids == (2, 259)
    ids = model.encode("hi")["input_ids"][0].tolist()
    assert ids == chat_tokenizer().apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    model.save_pretrained(world / "fusion", copy_adapters=True)
    loaded = FusedModel.from_pretrained(world / "fusion")
    assert loaded.prompt_origin == "the fusion's own format"
    assert (loaded.prompt, loaded.endings) == (model.prompt, model.endings)
    assert loaded.encode("hi")["input_ids"][0].tolist() == ids
    loaded.save_pretrained(world / "again")
    assert FusedModel.from_pretrained(world / "again").encode("hi")["input_ids"][0].tolist() == ids


def test_adapters_in_memory_bring_nothing() -> None:
    base = tiny_model(vocab_size=ROWS)
    adapter = random_adapter(base, "zh")
    model = FusedModel.from_adapters(base, {"zh": adapter}, "zh", tokenizer=chat_tokenizer())
    assert model.prompt_origin == "the base tokenizer's chat template"
    model.prompt = PromptFormat(template="{prompt}")
    assert model.prompt_origin == "the format that was given"


def test_a_base_is_given_back_where_adapters_disagree(world: Path) -> None:
    (world / "zh" / "chat_template.jinja").write_text(GEMMA)
    base = tiny_model(vocab_size=ROWS)
    with pytest.raises(DataError, match="different chat templates"):
        FusedModel.from_adapters(base, adapters(world), "average", tokenizer=byte_tokenizer())
    FusedModel.from_adapters(base, {"zh": world / "zh"}, "zh", tokenizer=byte_tokenizer())


def test_an_adapter_is_trained_further_with_its_own_template(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = PromptFormat.completion_ids

    def noted(self: PromptFormat, *args: Any) -> list[int]:
        ids = own(self, *args)
        seen.append((self.chat_template, ids[-1]))
        return ids

    monkeypatch.setattr(PromptFormat, "completion_ids", noted)
    config = FitConfig(max_steps=1, batch_size=1, gradient_accumulation=1)
    examples = [{"prompt": "hi", "completion": "ho"}]
    finetune(world / "base", examples, world / "tuned", adapter=world / "zh", config=config)
    assert seen == [(CHATML, 259)]


@pytest.mark.parametrize("own", [CHATML, CHATML + "\n"])
def test_the_bases_own_template_beside_an_adapter_stays_the_bases(tmp_path: Path, own: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = own
    source = place(tmp_path, "a", chat_template=CHATML + "\n")
    manner = choose(PromptFormat(), tokenizer, {"a": source}, ROWS)
    assert (manner.origin, manner.brought, manner.prompt) == (
        "the base tokenizer's chat template",
        False,
        PromptFormat(),
    )
