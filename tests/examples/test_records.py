"""What a record may be: every form is read, every fault is named with where it stands."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.errors import DataError
from loraflow.examples import Example, Fields, parse_example, parse_examples, read_examples

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_prompt_and_completion():
    record = {"prompt": "2+2?", "completion": "4", "level": 3}
    assert parse_example(record, "here") == Example(({"role": "user", "content": "2+2?"},), "4", record, "here")


def test_messages():
    record = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]}
    example = parse_example(record, "here")
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "user"]
    assert example.completion == "4"
    assert example.record is record


def test_any_two_fields():
    record = {"data": ["2+2?", {"answer": "4"}], "prompt": "not this"}
    example = parse_example(record, "here", Fields("data.0", "data.1.answer"))
    assert (example.messages[0]["content"], example.completion) == ("2+2?", "4")


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "messages", "completion"),
    [
        (
            {"prompt": [SYSTEM, TURNS[0]], "completion": [TURNS[1]]},
            [SYSTEM, TURNS[0]],
            "4",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "2+2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            [SYSTEM, TURNS[0]],
            "4",
        ),
        ({"conversations": TURNS}, TURNS[:1], "4"),
        (
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2+2"}],
            "4",
        ),
        ({"instruction": "Add.", "input": "", "output": "4"}, [{"role": "user", "content": "Add."}], "4"),
        ({"instruction": "Add.", "output": "4"}, [{"role": "user", "content": "Add."}], "4"),
        # Beside messages, a data set often has its prompt once more.
        ({"prompt": "2+2?", "messages": TURNS}, TURNS[:1], "4"),
    ],
)
def test_usual_shapes(record, messages, completion):
    example = parse_example(record, "here")
    assert (list(example.messages), example.completion, example.record) == (messages, completion, record)


def test_a_conversation_with_tools():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "4", "tool_calls": None, "name": "add"},
        TURNS[1],
    ]
    example = parse_example({"messages": messages, "tools": []}, "here")
    # None is what tables have where a message has not what another one has.
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert example.messages[1]["content"] == ""
    assert example.messages[2] == {"role": "tool", "content": "4", "name": "add"}


def test_fields_in_a_template():
    record = {"question": "2+2?", "choices": [4, 5.5], "hint": "", "a.b": "c"}
    fields = Fields("Q: {question} {{or}} {choices.1}{hint}\nA:", "{choices.0}")
    example = parse_example(record, "here", fields)
    assert (example.messages[0]["content"], example.completion) == ("Q: 2+2? {or} 5.5\nA:", "4")
    assert parse_example(record, "here", Fields("a.b", "question")).messages[0]["content"] == "c"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {", "The template 'Q: {' is malformed: Single '{' encountered"),
        ("Q: }", "Write {{ and }} for braces."),
        ("{}", "The template '{}' must have the names of fields in its braces, and nothing else."),
        ("{q!r}", "must have the names of fields"),
        ("{q:5}", "must have the names of fields"),
    ],
)
def test_templates_that_are_none(template, message):
    for names in ((template, "a"), ("a", template)):
        with pytest.raises(DataError, match=re.escape(message)):
            Fields(*names)


def test_a_file_is_read_with_its_lines_as_origins(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}, "", "  ", {"messages": TURNS})
    assert [e.origin for e in read_examples(path)] == [f"{path}:1", f"{path}:4"]
    assert [e.completion for e in read_examples(str(path))] == ["b", "4"]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert read_examples(path)[0].completion == "b"


@settings(max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=4),
    ascii_only=st.booleans(),
)
def test_any_text_survives_a_file(tmp_path, texts, ascii_only):
    # Only "\n" ends a JSON line; a line separator (U+2028) or a next-line character may stand within a string.
    lines = [
        json.dumps({"prompt": text, "completion": text}, ensure_ascii=ascii_only) for text in [*texts, "a\u2028b\x85c"]
    ]
    path = write_lines(tmp_path / "x.jsonl", *lines)
    assert [e.completion for e in read_examples(path)] == [*texts, "a\u2028b\x85c"]


def test_examples_in_memory_are_checked_and_made_ones_kept():
    made = parse_example({"prompt": "a", "completion": "b"}, "made")
    assert parse_examples([made, {"messages": TURNS}])[0] is made
    assert parse_examples([made, {"messages": TURNS}])[1].origin == "example 1"


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ("text", None, "here: expected an object, found str."),
        (None, None, "here: expected an object, found NoneType."),
        (
            {"question": "a", "answer": "b"},
            None,
            "here: expected `prompt` and `completion`, or `messages`; found ['answer', 'question'].",
        ),
        ({"prompt": "a"}, None, "found ['prompt']. Name two fields with `fields=Fields(prompt, completion)`."),
        ({"prompt": "a", "completion": " \n"}, None, "here: field 'completion' must be non-empty text, found ' \\n'."),
        ({"prompt": 3, "completion": "b"}, None, "here: field 'prompt' must be non-empty text, found 3."),
        ({"q": "a"}, Fields("q", "a"), "here: there is no field 'a'; the record has ['q']."),
        ({"q": ["a"]}, Fields("q.0", "q.1"), "here: there is no field 'q.1'"),
        ({"q": ["a"]}, Fields("q.first", "q.0"), "here: there is no field 'q.first'"),
        ({"q": "a"}, Fields("q.x", "q"), "here: there is no field 'q.x'"),
        ({"messages": "hi"}, None, "here: `messages` must be a list of at least a user's and an assistant's turn."),
        ({"messages": TURNS[:1]}, None, "here: `messages` must be a list of at least"),
        (
            {"messages": [*TURNS, "hi"]},
            None,
            "every message needs a `role` of system, user, assistant, tool; found 'hi'.",
        ),
        ({"messages": [{"role": "judge", "content": "x"}, *TURNS]}, None, "every message needs a `role`"),
        (
            {"messages": [TURNS[0], {"role": "assistant"}]},
            None,
            "here: there is no field 'content'; the record has ['role'].",
        ),
        (
            {"messages": TURNS[::-1]},
            None,
            "here: `messages` must end with a user's turn and the assistant's answer to it.",
        ),
        ({"messages": [TURNS[1], TURNS[1]]}, None, "here: `messages` must end with a user's turn"),
        ({"messages": [TURNS[0], TURNS[1], TURNS[0]]}, None, "A tool's turn may stand in the user's place."),
        ({"messages": TURNS, "tools": [{"name": "add"}]}, None, "made of messages alone, and there are `tools` too."),
        (
            {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]},
            None,
            "learned from its `content` alone, and it has `reasoning_content` too. Write that into `content`",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{}]}]},
            None,
            "learned from its `content` alone, and it has `tool_calls` too.",
        ),
        (
            {"prompt": TURNS[:1], "completion": [*TURNS[::-1], TURNS[1]]},
            None,
            "`completion` must be the assistant's one turn, found 3 messages. Give the whole conversation as",
        ),
        ({"prompt": TURNS[:1], "completion": TURNS[:1]}, None, "`prompt and completion` must end with a user's turn"),
        ({"prompt": TURNS[:1], "completion": "4"}, None, "field 'prompt' must be non-empty text, found [{"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
            None,
            "needs a `value`, and `from` of human, gpt, system, user, assistant, tool; found {'from': 'bing'",
        ),
        ({"conversations": [{"from": "human"}]}, None, "every turn of `conversations` needs a `value`"),
        ({"instruction": "a", "output": None}, None, "here: field 'output' must be non-empty text, found None."),
        ({"prompt": 3, "completion": "b"}, None, "In braces, as {prompt}, a number is taken as text."),
        ({"q": "a", "n": None}, Fields("q", "{n}"), "here: field 'n' must be text or a number, found None."),
        ({"q": "a", "n": float("inf")}, Fields("q", "{n}"), "here: field 'n' must be text or a number, found inf."),
        ({"q": "a", "n": " "}, Fields("q", "{n}"), "here: template '{n}' must be non-empty text, found ' '."),
        ({"q": "a"}, Fields("q", "{n}"), "here: there is no field 'n'; the record has ['q']."),
        (
            {"prompt": "a", "completion": "b\ud83d"},
            None,
            "here: field 'completion' has half a character in it: '\\ud83d'. Write it whole.",
        ),
    ],
)
def test_malformed_records_are_refused(record, fields, expected):
    with pytest.raises(DataError, match=re.escape(expected)):
        parse_example(record, "here", fields)


def test_the_message_names_file_and_line(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"}, "{'prompt': 1}")
    with pytest.raises(DataError, match=re.escape(f"{path}:2: not valid JSON (Expecting property name") + ".*column 2"):
        read_examples(path)
    write_lines(path, {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    with pytest.raises(DataError, match=re.escape(f"{path}:2: expected")):
        read_examples(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"There is no file {tmp_path / 'nowhere.jsonl'}")):
        read_examples(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_examples(tmp_path / "binary")


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no examples\. Give one JSON object a line\."):
        read_examples(write_lines(tmp_path / "x.jsonl", "", " "))
    with pytest.raises(DataError, match=r"No examples were given\. Give at least one\."):
        parse_examples([])


def test_several_bad_examples_in_memory_are_counted():
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a"}
    with pytest.raises(DataError, match=r"^example 1: expected .* 1 more of the 4 rows cannot be used either\.$"):
        parse_examples([good, bad, good, bad])
    with pytest.raises(DataError, match=re.escape("Read them with `loraflow.examples.read_examples`.")):
        parse_examples("x.jsonl")
