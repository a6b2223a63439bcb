"""Learning from every turn of a conversation: which tokens are labels, and which templates cannot say."""

from __future__ import annotations

import re

import pytest
from transformers import PythonBackend

from loraflow import FitConfig, FusedModel, PromptFormat
from loraflow.errors import DataError, LoraflowError
from loraflow.examples import parse_example
from loraflow.training.data import IGNORED, tokenize
from loraflow.training.turns import earlier_turns
from tests.test_prompts import FORGETFUL, UNEVEN
from tests.tiny import CHATML, GEMMA, chat_tokenizer, save_adapter, tiny_model

MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
# The end of all texts stands behind a conversation that nobody goes on with, as in Phi-3's template.
ENDED = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
CALLS = CHATML.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +")


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TURNS = [said("user", "1?"), said("assistant", "one"), said("user", "2?"), said("assistant", "two")]


def labels(messages, template, train_on="all", end="<|im_end|>"):
    """The texts that are learned, one for each run of labels."""
    tokenizer = chat_tokenizer(end, template)
    example = parse_example({"messages": messages}, "here")
    row = tokenize([example], tokenizer, PromptFormat().resolve(tokenizer), 500, train_on).rows[0]
    runs = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, IGNORED)
        runs[-1].append(token) if label != IGNORED else runs.append([])
    return [tokenizer.decode(run) for run in runs if run], row


def test_the_two_templates_differ():
    assert MARKED.count("generation %}") == 2


@pytest.mark.parametrize("template", [CHATML, MARKED, ENDED])
def test_every_answer_is_learned_up_to_its_end(template):
    texts, row = labels([said("system", "Be brief."), *TURNS, said("user", "3?"), said("assistant", "three")], template)
    assert [text.removesuffix("<|endoftext|>") for text in texts] == [f"{n}<|im_end|>" for n in ("one", "two", "three")]
    last, same = labels(
        [said("system", "Be brief."), *TURNS, said("user", "3?"), said("assistant", "three")], template, "last"
    )
    assert last == texts[-1:]
    assert same.input_ids == row.input_ids


def test_a_template_that_trims_answers():
    texts, _ = labels([TURNS[0], said("assistant", " one "), *TURNS[2:]], GEMMA, end="<end_of_turn>")
    assert texts == ["one<end_of_turn>", "two<end_of_turn>"]


def test_labels_are_the_masks_of_transformers():
    tokenizer = chat_tokenizer("<|im_end|>", MARKED)
    theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    _, row = labels(TURNS, MARKED)
    mine = [int(label != IGNORED) for label in row.labels]
    # Theirs go on with what the template writes behind the last answer.
    assert theirs["input_ids"][: len(mine)] == row.input_ids
    assert theirs["assistant_masks"][: len(mine)] == mine


def test_a_call_of_a_tool_is_an_answer_and_its_result_none():
    call = said("assistant", "", tool_calls=[{"name": "add"}])
    texts, _ = labels([TURNS[0], call, said("tool", "4"), TURNS[3]], CALLS)
    assert texts == ['[{"name": "add"}]<|im_end|>', "two<|im_end|>"]


def test_one_turn_is_the_same_either_way():
    assert labels(TURNS[:2], CHATML) == labels(TURNS[:2], CHATML, "last")


THOUGHT = [TURNS[0], said("assistant", "<think>Hm.</think>one"), *TURNS[2:]]
FORGETS = MARKED.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
)


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (THOUGHT, FORGETFUL, "writes the assistant's turn (message 2 of the conversation) otherwise when it is past"),
        (THOUGHT, FORGETS, "it may drop thoughts, or begin answers with some. Learn from the last turn"),
        (TURNS, UNEVEN, "(`train_on='last'`), or give another template as `chat_template`."),
        (
            TURNS,
            CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            "The chat template has `{% generation %}` in it, and marks no answer with it.",
        ),
    ],
)
def test_templates_that_cannot_say_are_refused(messages, template, message):
    with pytest.raises(DataError, match="^here: .*" + re.escape(message)):
        labels(messages, template)
    # The last turn can be learned from all the same.
    assert labels(messages, template, "last")[0]


def test_a_forgetful_template_forgets_nothing_where_nothing_is_thought():
    assert len(labels(TURNS, FORGETS)[0]) == 2


def test_a_template_that_wants_a_question_first_is_refused():
    template = "{{ raise_exception('who asks?') if messages | length < 2 }}" + MARKED
    with pytest.raises(DataError, match=r"here: The chat template refuses the conversation: who asks\?"):
        labels([said("assistant", "hello"), *TURNS], template)


def test_several_bad_conversations_are_counted():
    tokenizer = chat_tokenizer("<|im_end|>", FORGETFUL)
    examples = [parse_example({"messages": messages}, f"x:{n}") for n, messages in enumerate([TURNS, THOUGHT, THOUGHT])]
    with pytest.raises(DataError, match=r"^x:1: .* 1 more of the 3 rows cannot be used either\.$"):
        tokenize(examples, tokenizer, PromptFormat().resolve(tokenizer), 500, "all")


def test_a_tokenizer_without_places_is_refused():
    class Slow(PythonBackend):
        def __init__(self):
            pass

    with pytest.raises(DataError, match=r"The Slow does not say where its tokens stand .* load the fast tokenizer\."):
        earlier_turns(PromptFormat(chat_template=CHATML), Slow(), TURNS[:3])


def test_a_fit_learns_from_what_is_asked(tmp_path):
    base = tiny_model(vocab_size=300, max_position_embeddings=256)
    tokenizer = chat_tokenizer()
    model = FusedModel.from_adapters(base, {"a": save_adapter(base, tmp_path / "a", seed=1)}, tokenizer=tokenizer)
    digests = []
    for train_on in ("last", "all"):
        model.fit([{"messages": TURNS}], config=FitConfig(epochs=1, train_on=train_on))
        digests.append(model.training_record["data_sha256"])
        assert model.training_record["recipe"]["train_on"] == train_on
    assert digests[0] != digests[1]


def test_unknown_turns_are_refused():
    with pytest.raises(
        LoraflowError, match=re.escape("`train_on` is unknown: 'al'. Known: 'all', 'last'. Did you mean 'all'?")
    ):
        FitConfig(train_on="al")
