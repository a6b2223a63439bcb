"""Tasks of lm-evaluation-harness on fusions: the same answers as everywhere else, and no code outside the sandbox."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
import evaluate
import huggingface_hub
import lm_eval
import lm_eval.tasks

from loraflow import FusedModel
from loraflow.answers import generate_answers
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import DataError, LoraflowError, MethodError, SandboxError
from loraflow.evaluation.harness import (
    PAPER_TASKS,
    FusionLM,
    HarnessResult,
    code_check,
    code_eval,
    evaluate_task,
    rescore_task,
)
from loraflow.evaluation.harness import evaluate as harness
from loraflow.evaluation.harness.code_eval import SandboxedCodeEval, pass_at_k, sandboxed_code_eval
from loraflow.evaluation.paper import problems
from loraflow.evaluation.sandbox import check_available, run_many
from loraflow.evaluation.scoring import same_number
from loraflow.methods import QueryMethod
from loraflow.prompts import PromptFormat

PAPER = Path(os.environ.get("LORAFLOW_PAPER_DATA", "no such place"))
needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason="LORAFLOW_PAPER_DATA does not name the paper's data")

COUNT = 10
LONGEST = 120
PROBLEMS = load_task("zh-math").test[:COUNT]

MATH = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/math.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: {until}, do_sample: false, max_gen_toks: {longest}}}
process_results: !function scoring.score
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
  - {{metric: length, aggregation: mean, higher_is_better: false}}
"""
SCORING = """
from loraflow.evaluation.scoring import same_number

def score(doc, results):
    return {"right": float(same_number(results[0], doc["answer"])), "length": len(results[0])}
"""
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
# As lm-eval's own tasks/humaneval has it.
HUMANEVAL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/code.jsonl}}}}
unsafe_code: {unsafe}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{test}}}}\\ncheck({{{{entry_point}}}})"
metric_list:
  - metric: !function {module}.pass_at_k
    aggregation: mean
    higher_is_better: true
    k: [1]
generation_kwargs: {{until: ["\\ndef"], max_gen_toks: 8, do_sample: false}}
num_fewshot: 0
filter_list:
  - name: create_test
    filter:
      - function: custom
        filter_fn: !function {module}.build_predictions
"""
STOCK_LIKE = """
import evaluate as hf_evaluate

compute_ = hf_evaluate.load("code_eval")
results = compute_.compute(references=["assert add(2, 3)==5"], predictions=[["def add(a,b): return a*b"]], k=[1])


def pass_at_k(references, predictions, k=None):
    return compute_.compute(references=references, predictions=predictions, k=k)[0]


def build_predictions(resps, docs):
    return [[doc["prompt"] + r for r in resp] for resp, doc in zip(resps, docs)]
"""
OWN_EXEC = STOCK_LIKE + "\n\ndef sneak(code):\n    exec(code)\n"
NO_SANDBOX = """
def pass_at_k(references, predictions, k=None):
    return {"pass@1": 1.0}


def build_predictions(resps, docs):
    return resps
"""


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over the small world's problems."""
    folder = tmp_path_factory.mktemp("tasks")
    write_lines(folder / "math.jsonl", [{"question": p.prompt, "answer": p.answer} for p in PROBLEMS])
    (folder / "scoring.py").write_text(SCORING)
    variants = {"local_math": ([], LONGEST), "stopped_math": (["="], LONGEST), "endless_math": ([], 512)}
    variants["crowded_math"] = ([], 500)
    for name, (until, longest) in variants.items():
        values = {"name": name, "folder": folder, "until": json.dumps(until), "longest": longest}
        (folder / f"{name}.yaml").write_text(MATH.format(**values))
    rows = [
        {"question": p.prompt, "choices": [f"{p.answer}。", "一。", f"{int(p.answer) + 1} 个。"], "label": 0}
        for p in PROBLEMS
    ]
    write_lines(folder / "choices.jsonl", rows)
    (folder / "choices.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "rolling.yaml").write_text(
        CHOICES.format(folder=folder)
        .split("metric_list")[0]
        .replace("local_choices", "local_rolling")
        .replace("multiple_choice", "loglikelihood_rolling")
        .replace("doc_to_choice: choices\n", "")
        .replace("{{label}}", "{{question}}")
    )
    (folder / "absent.yaml").write_text("task: local_absent\ndataset_path: nobody/no-such-data\ntest_split: test\n")
    (folder / "broken.yaml").write_text("include: local_math.yaml\ntask: local_broken\ntest_split: nowhere\n")
    (folder / "needy.yaml").write_text(
        "include: local_math.yaml\ntask: local_needy\nprocess_docs: !function no_mod.f\n"
    )
    (folder / "late.py").write_text("def score(doc, results):\n    raise FileNotFoundError('no metric here')\n")
    (folder / "late.yaml").write_text(
        "include: local_math.yaml\ntask: local_late\nprocess_results: !function late.score\n"
    )
    (folder / "shots.yaml").write_text(
        "include: local_math.yaml\ntask: local_shots\nfewshot_split: test\nfewshot_config: {sampler: first_n}\n"
    )
    (folder / "zero.yaml").write_text("include: local_math.yaml\ntask: local_zero\nnum_fewshot: 0\n")
    code = [
        {"prompt": "def add(a, b):\n", "entry_point": "add", "test": f"def check(f):\n    assert f({n}, 2) == {n + 2}"}
        for n in range(4)
    ]
    write_lines(folder / "code.jsonl", code)
    modules = {"stock_like": STOCK_LIKE, "own_exec": OWN_EXEC, "no_sandbox": NO_SANDBOX}
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
        values = {"name": f"local_{name}", "folder": folder, "module": name, "unsafe": "true"}
        (folder / f"{name}.yaml").write_text(HUMANEVAL.format(**values))
    values = {"name": "local_unmarked", "folder": folder, "module": "stock_like", "unsafe": "false"}
    (folder / "unmarked.yaml").write_text(HUMANEVAL.format(**values))
    (folder / "by_name.yaml").write_text(
        HUMANEVAL.format(**{**values, "name": "local_by_name", "module": "no_sandbox"}).replace(
            "!function no_sandbox.pass_at_k", "code_eval\n    hf_evaluate: true"
        )
    )
    return folder


@pytest.fixture(scope="module")
def model():
    return FusedModel.from_adapters(base_path(), {name: adapter_paths()[name] for name in ("zh-chat", "math")})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture
def sandbox():
    try:
        check_available()
    except SandboxError as error:
        pytest.skip(str(error))


def own_run(model, count=COUNT, **options):
    return generate_answers(
        model,
        [[{"role": "user", "content": problem.prompt}] for problem in PROBLEMS[:count]],
        tokenizer=model.tokenizer,
        prompt=model.prompt,
        max_new_tokens=LONGEST,
        **options,
    )


# ------------------------------------------------------------------------------------------------------- generation


def test_answers_and_scores_are_those_of_our_own_run(model, folder):
    seen = []
    result = evaluate_task(
        model, "local_math", include_path=folder, chat=True, on_progress=lambda done, total: seen.append((done, total))
    )
    answers = own_run(model)
    right = [float(same_number(answer.text, problem.answer)) for answer, problem in zip(answers, PROBLEMS, strict=True)]
    assert [item.responses for item in result.items] == [[[answer.text]] for answer in answers]
    assert [item.tokens for item in result.items] == [answer.tokens for answer in answers]
    assert [item.scores["right"] for item in result.items] == right
    assert 0 < sum(right) < COUNT
    assert result.aggregate["right"] == pytest.approx(sum(right) / COUNT)
    share = sum(right) / COUNT
    assert result.aggregate["right_stderr"] == pytest.approx((share * (1 - share) / (COUNT - 1)) ** 0.5)
    assert (result.metric, result.higher_is_better, result.notice) == ("right", True, None)
    assert [item.target for item in result.items] == [problem.answer for problem in PROBLEMS]
    assert [item.id for item in result.items] == [str(number) for number in range(COUNT)]
    assert seen == [(done, COUNT) for done in range(1, COUNT + 1)]


def test_limit_and_metric_are_chosen(model, folder):
    result = evaluate_task(model, "local_math", include_path=folder, chat=True, limit=2, metric="length")
    assert (result.metric, result.higher_is_better, len(result.items)) == ("length", False, 2)
    assert result.aggregate["length"] == sum(len(answer.text) for answer in own_run(model, 2)) / 2


def test_answers_end_at_stop_strings(model, folder):
    result = evaluate_task(model, "stopped_math", include_path=folder, chat=True, limit=3)
    assert [item.responses[0][0] for item in result.items] == [a.text.split("=")[0] for a in own_run(model, 3)]


def test_another_method_answers_otherwise(model, folder):
    with model.using("base"):
        base = evaluate_task(model, "local_math", include_path=folder, chat=True, limit=3)
    with model.using("math"):
        math = evaluate_task(model, "local_math", include_path=folder, chat=True, limit=3)
    assert [item.responses for item in base.items] != [item.responses for item in math.items]


def test_nothing_of_the_caller_is_changed(model, folder, capfd):
    model.train()
    log, draws = logging.getLogger("lm_eval"), torch.random.get_rng_state()
    level, load = log.level, evaluate.load
    try:
        evaluate_task(model, "local_math", include_path=folder, limit=1)
        assert model.training
    finally:
        model.eval()
    assert (log.level, evaluate.load) == (level, load)
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "prompt",
    [
        PromptFormat(),
        PromptFormat(system_prompt="Ты помощник."),
        PromptFormat(chat_template="{% for message in messages %}[{{ message.content }}]{% endfor %}"),
        PromptFormat(template="Q: {prompt}\nA:"),
        PromptFormat(template="{system}|{prompt}", system_prompt="Отвечай."),
    ],
    ids=["chat", "chat-system", "chat-without-start", "plain", "plain-system"],
)
def test_chat_prompts_have_the_same_token_ids(model, prompt, monkeypatch):
    monkeypatch.setattr(model, "prompt", prompt.resolve(model.tokenizer))
    # A tokenizer that puts the start token before all text, as Llama's does.
    messages = [{"role": "user", "content": PROBLEMS[0].prompt}]
    for adds in (False, True):
        with_start = adding_start(model.tokenizer) if adds else model.tokenizer
        monkeypatch.setattr(model, "tokenizer", with_start)
        lm = FusionLM(model, chat=True)
        expected = model.prompt.prompt_ids(with_start, messages)
        text = lm.apply_chat_template(messages)
        assert lm.tok_encode(text) == expected
        assert expected.count(with_start.bos_token_id) <= 1
        context, continuation = lm._encode_pair(text, "18")
        assert context == expected
        assert lm.apply_chat_template([*messages, {"role": "assistant", "content": "18"}], False) == text + "18"
        assert len(continuation) >= 1


def adding_start(tokenizer):
    from transformers import PreTrainedTokenizerFast

    changed = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    )
    from tokenizers.processors import TemplateProcessing

    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    changed._tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(changed, name, getattr(tokenizer, name))
    assert changed("a")["input_ids"][0] == start[1]
    return changed


def test_without_chat_the_text_is_read_as_it_is(model, folder):
    result = evaluate_task(model, "local_math", include_path=folder, limit=2)
    assert [item.prompt for item in result.items] == [problem.prompt for problem in PROBLEMS[:2]]
    ids = [model.tokenizer(problem.prompt)["input_ids"] for problem in PROBLEMS[:2]]
    alone = [model.generate(torch.tensor([row]), max_new_tokens=LONGEST, do_sample=False)[0, len(row) :] for row in ids]
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in alone]
    assert [item.responses[0][0] for item in result.items] == texts


def test_examples_in_prompts(model, folder, monkeypatch):
    plain = evaluate_task(model, "local_shots", include_path=folder, limit=1, num_fewshot=2)
    assert plain.items[0].prompt.count("\n\n") == 2
    turns = evaluate_task(model, "local_shots", include_path=folder, limit=1, num_fewshot=2, chat=True)
    assert turns.items[0].prompt.count("<|assistant|>") == 3
    monkeypatch.setattr(model, "prompt", PromptFormat(template="[Q] {prompt} [A]"))
    single = evaluate_task(model, "local_shots", include_path=folder, limit=1, num_fewshot=2, chat=True)
    assert single.items[0].prompt.count("[Q]") == 1
    assert PROBLEMS[1].prompt in single.items[0].prompt


def test_long_prompts_are_cut_and_it_is_said(model, folder):
    result = evaluate_task(model, "crowded_math", include_path=folder, limit=1)
    assert result.notice == "1 prompts are longer than the model reads, and lost their beginnings, as in lm-eval."
    ids = model.tokenizer(PROBLEMS[0].prompt)["input_ids"][-12:]
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=500, do_sample=False)[0, 12:]
    assert result.items[0].responses[0][0] == model.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("chat", [False, True])
def test_lm_evals_own_entry_point_takes_it(model, folder, chat):
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        FusionLM(model, chat=chat), tasks=["local_math"], task_manager=manager, limit=3, apply_chat_template=chat
    )
    result = evaluate_task(model, "local_math", include_path=folder, limit=3, chat=chat)
    samples = found["samples"]["local_math"]
    assert [sample["resps"] for sample in samples] == [item.responses for item in result.items]
    assert found["results"]["local_math"]["right,none"] == result.aggregate["right"]


@pytest.mark.parametrize("method", ["average", "qa-flora"])
def test_stock_hflm_generates_and_scores_the_same(model, folder, method):
    from lm_eval.models.huggingface import HFLM

    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    with model.using(method):
        stock = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=4)
        found = lm_eval.simple_evaluate(stock, tasks=["local_math"], task_manager=manager, limit=6)
        result = evaluate_task(model, "local_math", include_path=folder, limit=6)
    assert [sample["resps"] for sample in found["samples"]["local_math"]] == [item.responses for item in result.items]
    assert found["results"]["local_math"]["right,none"] == result.aggregate["right"]


@pytest.mark.parametrize(("task", "method"), [("local_math", "base"), ("local_choices", "qa-flora")])
def test_lm_evals_cache_takes_it(model, folder, tmp_path, monkeypatch, task, method):
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    options = {"tasks": [task], "task_manager": manager, "limit": 2, "use_cache": str(tmp_path / "cache")}
    with model.using(method):
        first = lm_eval.simple_evaluate(FusionLM(model), **options)
        monkeypatch.setattr(model, "generate", None)
        monkeypatch.setattr(model, "weigh", None)
        second = lm_eval.simple_evaluate(FusionLM(model), **options)
    responses = [[sample["resps"] for sample in found["samples"][task]] for found in (first, second)]
    assert responses[0] == responses[1]


# -------------------------------------------------------------------------------------------------------- likelihood


def test_multiple_choice_gives_what_hflm_gives(model, folder):
    from lm_eval.models.huggingface import HFLM

    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    stock = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=4)
    expected = lm_eval.simple_evaluate(stock, tasks=["local_choices"], task_manager=manager)
    seen = []
    result = evaluate_task(
        model, "local_choices", include_path=folder, on_progress=lambda done, total: seen.append((done, total))
    )
    for name in ("acc", "acc_norm"):
        assert result.aggregate[name] == expected["results"]["local_choices"][f"{name},none"]
    for item, sample in zip(result.items, expected["samples"]["local_choices"], strict=True):
        assert item.scores == {"acc": sample["acc"], "acc_norm": sample["acc_norm"]}
        found = torch.tensor([response[0][0] for response in item.responses])
        torch.testing.assert_close(found, torch.tensor([response[0][0] for response in sample["resps"]]))
    assert result.metric == "acc"
    assert result.items[0].tokens is None
    assert seen[-1] == (3 * COUNT, 3 * COUNT)
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_methods_that_weigh_prompts_see_each_context(model, folder):
    with model.using("qa-flora"):
        assert isinstance(model.method, QueryMethod)
        result = evaluate_task(model, "local_choices", include_path=folder, limit=2, batch_size=4)
        for item, problem in zip(result.items, PROBLEMS, strict=False):
            context = model.tokenizer(problem.prompt, return_tensors="pt")
            weights = model.weigh(**context)
            choices = [f"{problem.answer}。", "一。", f"{int(problem.answer) + 1} 个。"]
            for choice, [(likely, greedy)] in zip(choices, item.responses, strict=True):
                whole = model.tokenizer(problem.prompt + choice, return_tensors="pt")["input_ids"]
                start = context["input_ids"].shape[1]
                logs = model(whole, fusion_weights=weights).logits[0, start - 1 : -1].log_softmax(-1)
                expected = logs.gather(1, whole[0, start:, None]).sum().item()
                assert likely == pytest.approx(expected, rel=1e-4)
                assert greedy == torch.equal(logs.argmax(-1), whole[0, start:])


def test_whole_texts(model, folder):
    result = evaluate_task(model, "local_rolling", include_path=folder, limit=2)
    assert result.metric == "word_perplexity"
    assert result.higher_is_better is False
    assert result.items[0].scores == {}
    assert result.aggregate["word_perplexity"] > 1
    with model.using("qa-flora"), pytest.raises(MethodError, match=r"'qa-flora' weighs each prompt, and a text whose"):
        evaluate_task(model, "local_rolling", include_path=folder, limit=2)


# --------------------------------------------------------------------------------------------------------- rescoring


@pytest.mark.parametrize("name", ["local_math", "local_choices"])
def test_stored_responses_get_the_same_scores(model, folder, name):
    result = evaluate_task(model, name, include_path=folder, chat=True, limit=6)
    stored = HarnessResult.from_json(json.loads(json.dumps(result.to_json())))
    assert stored == result
    assert rescore_task(stored, include_path=folder) == result
    some = dataclasses.replace(stored, items=[stored.items[4], stored.items[1]])
    again = rescore_task(some, include_path=folder)
    assert again.items == [stored.items[1], stored.items[4]]


def test_changed_responses_get_other_scores(model, folder):
    result = evaluate_task(model, "local_math", include_path=folder, limit=2)
    items = [
        dataclasses.replace(item, responses=[[text]])
        for item, text in zip(result.items, (f"答案是{PROBLEMS[0].answer}", "不知道"), strict=True)
    ]
    again = rescore_task(dataclasses.replace(result, items=items), include_path=folder)
    assert [item.scores["right"] for item in again.items] == [1.0, 0.0]
    assert again.aggregate["right"] == 0.5
    assert rescore_task(result, include_path=folder, metric="length").metric == "length"


def test_changed_problems_are_not_scored(model, folder, tmp_path):
    result = evaluate_task(model, "local_math", include_path=folder, limit=2)
    for path in folder.iterdir():
        if path.suffix in (".yaml", ".py"):
            (tmp_path / path.name).write_text(path.read_text().replace(str(folder), str(tmp_path)))
    records = [{"question": problem.prompt, "answer": problem.answer} for problem in PROBLEMS]
    write_lines(tmp_path / "math.jsonl", [records[0], records[2]])
    with pytest.raises(
        DataError, match=r"Problem 1 of the task 'local_math' is no longer the one that was answered\. "
    ):
        rescore_task(result, include_path=tmp_path)
    write_lines(tmp_path / "math.jsonl", records[:1])
    with pytest.raises(DataError, match=r"Problem 1 of the task 'local_math' is no longer"):
        rescore_task(result, include_path=tmp_path)
    fewer = dataclasses.replace(result, items=[dataclasses.replace(result.items[0], responses=[])])
    with pytest.raises(DataError, match=r"Problem at position 0 of the task 'local_math' is no longer"):
        rescore_task(fewer, include_path=folder)
    with pytest.raises(DataError, match=r"The stored result of the task 'local_math' has no items\."):
        rescore_task(dataclasses.replace(result, items=[]), include_path=folder)


@pytest.mark.parametrize("value", [{}, {"items": [{"id": "0"}]}, {"items": []}])
def test_what_is_no_result(value):
    with pytest.raises(DataError, match=r"This is no stored result of a task: .*Give what `to_json` returned\."):
        HarnessResult.from_json(value)


# ------------------------------------------------------------------------------------------------------------ errors


def test_unknown_tasks_and_groups(model):
    # One test, for reading all of lm-eval's task files takes seconds.
    with pytest.raises(
        LoraflowError, match=r"no task 'mgsm_direct_zn'\. Did you mean .*'mgsm_direct_zh'.*include_path"
    ):
        evaluate_task(model, "mgsm_direct_zn")
    with pytest.raises(LoraflowError, match=r"'mgsm_direct' is not one task but a group .*, mgsm_direct_zh\."):
        evaluate_task(model, "mgsm_direct")
    with pytest.raises(LoraflowError, match=r"'mmlu' is not one task but a group of them\. .*mmlu_stem"):
        evaluate_task(model, "mmlu")
    with pytest.raises(
        LoraflowError, match=r"'loraflow_paper' is not one task .*: loraflow_es_code, loraflow_es_math,"
    ):
        evaluate_task(model, "loraflow_paper")
    for name in ("humaneval", "mbpp", "cruxeval_output", "loraflow_zh_code"):
        with pytest.raises(SandboxError, match=rf"'{name}' runs programs that a model wrote.*allow_code=True`"):
            evaluate_task(model, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, r"`limit` \(=0\) must be at least 1\."),
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be at least 1\."),
        ({"num_fewshot": -1}, r"`num_fewshot` \(=-1\) must be at least 0\."),
        ({"metric": "pass"}, r"'local_math' has no metric 'pass'\. Give one of 'right', 'length'\."),
        ({"include_path": Path("/nowhere")}, r"`include_path` \(='/nowhere'\) must be a folder with task files"),
        ({"task": "local_zero", "num_fewshot": 2}, r"\(=2\) must be 0: the task 'local_zero' is one without examples"),
        ({"task": "endless_math"}, r"asks for 512 new tokens, and the model reads 512.*a smaller `max_gen_toks`\."),
        ({"task": "local_broken"}, r"cannot load the task 'local_broken': KeyError: .*Correct the task's files"),
        (
            {"task": "local_needy"},
            r"cannot load the task 'local_needy': ImportError: .*no_mod.*Install what it names\.",
        ),
        ({"task": "local_late"}, r"cannot finish the task 'local_late': FileNotFoundError: no metric here\. It needs"),
    ],
)
def test_wrong_settings(model, folder, options, message):
    with pytest.raises(LoraflowError, match=message):
        evaluate_task(model, **{"task": "local_math", "include_path": folder, "limit": 1, **options})


def test_ambiguous_metric_is_named():
    names = ["exact_match,strict", "exact_match,flexible"]
    with pytest.raises(
        LoraflowError, match=r"'t' has several metrics 'exact_match'\. Give one of 'exact_match,strict', "
    ):
        harness._choose_metric("t", names, "exact_match")
    assert harness._choose_metric("t", names, "exact_match,flexible") == "exact_match,flexible"
    assert harness._choose_metric("t", names, None) == "exact_match,strict"


def test_data_that_cannot_be_had(model, folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        r"lm-eval cannot load the task 'local_absent': \w+: .*no-such-data.*It needs the dataset 'nobody/no-such-data' "
        r".*`hf download --repo-type dataset nobody/no-such-data`, and set HF_HOME"
    )
    with pytest.raises(LoraflowError, match=message):
        evaluate_task(model, "local_absent", include_path=folder)


def test_missing_lm_eval(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    harness.lm_classes.cache_clear()
    try:
        with pytest.raises(
            LoraflowError, match=r"Tasks need lm-evaluation-harness .*pip install 'loraflow\[evaluation\]'"
        ):
            evaluate_task(model, "local_math")
    finally:
        harness.lm_classes.cache_clear()


def test_other_attributes_are_none():
    with pytest.raises(AttributeError, match="has no attribute 'NoLM'"):
        _ = harness.NoLM


def test_model_without_a_tokenizer(model, folder, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(LoraflowError, match=r"Text needs a tokenizer"):
        evaluate_task(model, "local_math", include_path=folder)


# -------------------------------------------------------------------------------------------------------------- code


@pytest.mark.usefixtures("sandbox")
def test_code_runs_in_our_sandbox_only(model, folder, tmp_path, monkeypatch, caplog):
    code_eval.announce.cache_clear()
    monkeypatch.setenv("LORAFLOW_SECRET", "do not tell")
    target = tmp_path / "written"
    tmp_path.chmod(0o777)
    answered = evaluate_task(model, "local_stock_like", include_path=folder, allow_code=True)
    assert "local_stock_like' runs code that a model wrote, in loraflow's sandbox. lm-eval's stock" in answered.notice
    assert caplog.text.count(answered.notice) == 1
    texts = [
        "    return a + b",
        "    return a * b",
        f"    open({str(target)!r}, 'w').write('out')\n    return a + b",
        "    import os\n    return a + b if 'LORAFLOW_SECRET' in os.environ else None",
    ]
    items = [dataclasses.replace(item, responses=[[text]]) for item, text in zip(answered.items, texts, strict=True)]
    result = rescore_task(dataclasses.replace(answered, items=items), include_path=folder, allow_code=True)
    assert [item.scores for item in result.items] == [{"pass@1,create_test": score} for score in (1.0, 0.0, 0.0, 0.0)]
    assert result.metric == "pass@1,create_test"
    assert result.aggregate["pass@1,create_test"] == 0.25
    assert not target.exists()
    assert caplog.text.count(answered.notice) == 1


@pytest.mark.usefixtures("sandbox")
def test_modules_loaded_before_do_not_bring_the_stock_metric(model, folder, monkeypatch):
    class Stock:
        name = "code_eval"

        def compute(self, **_):
            raise AssertionError("ran outside the sandbox")

    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    stock = Stock()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", lambda *_: type("Quiet", (), {"compute": lambda *_, **__: None})())
        before = _load_module_with_cache(folder / "stock_like.py")
    before.compute_ = stock
    evaluate_task(model, "local_stock_like", include_path=folder, allow_code=True, limit=1)
    # And it has its own again afterwards.
    assert _load_module_with_cache(folder / "stock_like.py") is before
    assert before.compute_ is stock


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "local_own_exec",
            r"'local_own_exec' is refused: .*own_exec runs code by `exec`, outside the sandbox\. Tasks may",
        ),
        (
            "local_no_sandbox",
            r"'local_no_sandbox' is refused: it says that it runs code .* and uses neither `code_eval`",
        ),
    ],
)
def test_other_ways_to_run_code_are_refused(model, folder, task, message):
    with pytest.raises(SandboxError, match=message):
        evaluate_task(model, task, include_path=folder, allow_code=True)


@pytest.mark.parametrize("task", ["local_stock_like", "local_unmarked", "local_by_name", "local_no_sandbox"])
def test_code_needs_permission(model, folder, task):
    with pytest.raises(SandboxError, match=rf"The task '{task}' runs programs that a model wrote.*`allow_code=True`"):
        evaluate_task(model, task, include_path=folder)


hidden_runner = os.system


def module_of(tmp_path, text, name="task_module"):
    import importlib.util

    (tmp_path / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("def f(x): return eval(x)", "`eval`"),
        ("import subprocess\ndef f(x): subprocess.run(x)", "`subprocess`"),
        ("from multiprocessing import Process\ndef f(x): Process(target=x)", "`multiprocessing`"),
        ("import os\ndef f(x): os.system(x)", "`os.system`"),
        ("import os, re\ndef f(x): return re.compile(os.path.join(x))", None),
        ("class M:\n    name = 'code_eval'\nstock = M()\ndef f(x): return stock", "the stock `code_eval`"),
        ("from os import system\ndef f(x): system(x)", "`os.system`"),
        ("from os import popen as p\ndef f(x): p(x)", "`os.popen`"),
        ("from os import *\ndef f(x): system(x)", "`os.*`"),
        ("import os as o\ndef f(x): o.execvp(x, [])", "`os.execvp`"),
        ("import os.path\ndef f(x): os.spawnl(0, x)", "`os.spawnl`"),
        ("import os\no = os\ndef f(x): o.fork()", "`os.fork`"),
        ("import os\ndef f(x): getattr(os, 'system')(x)", "`os.system`"),
        ("import os\ndef f(x, name): getattr(os, name)(x)", "`os.*`"),
        ("import os\ndef f(x): vars(os)['system'](x)", "`os.*`"),
        ("import os\ndef f(x): os.__dict__['system'](x)", "`os.__dict__`"),
        ("import os\nfrom operator import attrgetter\ndef f(x): attrgetter('system')(os)(x)", "`os.*`"),
        ("import shutil\ndef f(x): shutil.os.system(x)", "`os.system`"),
        ("import sys\ndef f(x): sys.modules['os'].system(x)", "`os.system`"),
        ("import sys\ndef f(x, name): sys.modules[name].run(x)", "`sys.modules.*`"),
        ("from subprocess import run\ndef f(x): run(x)", "`subprocess`"),
        ("import importlib\ndef f(x): importlib.import_module('subprocess').run(x)", "`subprocess`"),
        ("from importlib import import_module as i\ndef f(x): i('os').system(x)", "`os.system`"),
        ("from importlib import import_module as i\ndef f(x, name): i(name).run(x)", "`importlib.import_module`"),
        ("def f(x): __import__('os').system(x)", "`os.system`"),
        (
            "from importlib import util\ndef f(x): util.spec_from_file_location('m', x)",
            "`importlib.util.spec_from_file_location`",
        ),
        ("import builtins\ndef f(x): builtins.exec(x)", "`exec`"),
        ("from builtins import exec as run\ndef f(x): run(x)", "`exec`"),
        ("def f(x): __builtins__['exec'](x)", "`exec`"),
        ("def f(x): globals()['__builtins__']", "`builtins.*`"),
        ("run = exec\ndef f(x): run(x)", "`exec`"),
        ("def f(x): return list(map(eval, x))", "`eval`"),
        ("import asyncio\ndef f(x): asyncio.create_subprocess_shell(x)", "`asyncio.create_subprocess_shell`"),
        ("import timeit\ndef f(x): timeit.timeit(x)", "`timeit.timeit`"),
        ("from tests.evaluation.harness.test_harness import hidden_runner as f", "`os.system`"),
        ("from re import compile\ndef f(x): return compile(x)", None),
        ("def f(model, frame): return model.eval(), frame.eval('x'), frame.code", None),
        ("def eval(x): return x\ndef f(x): return eval(x)", None),
        ("import os\ndef f(x): return os.environ, os.getcwd(), hasattr(os, x), getattr(os, 'sep')", None),
        ("import sys\ndef f(x): return x in sys.modules, sys.modules[__name__]", None),
        ("import ast, importlib\ndef f(x): return ast.literal_eval(x), importlib.import_module('json')", None),
        ("from timeit import default_timer as f", None),
    ],
)
def test_what_counts_as_running_code(tmp_path, monkeypatch, text, means):
    module = module_of(tmp_path, text)
    monkeypatch.setitem(sys.modules, "task_module", module)
    assert code_check.own_means(module) == means


def checked(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module.__name__, module)
    code_check.check_code_task("local", {"process_results": module.f}, code_eval.Replacement())


@pytest.mark.parametrize(
    "text",
    [
        "from loraflow.evaluation.sandbox import run_tests\ndef f(x): return run_tests(x, ['f()'])",
        "from loraflow.evaluation import run_tests as run\ndef f(x): return run(x, ['f()'])",
        "import loraflow.evaluation.sandbox as s\ndef f(x): return s.run_many(x)",
        "import loraflow.evaluation.sandbox\ndef f(x): return loraflow.evaluation.sandbox.run_many(x)",
        "def f(x):\n    from loraflow.evaluation.sandbox import run_tests\n    return run_tests(x, ['f()'])",
        "from loraflow.evaluation.scoring import get_scorer\ndef f(x): return get_scorer('code-tests')",
        "from loraflow.evaluation.scoring import CodeTests\nscore = CodeTests(True)\ndef f(x): return score(x, {})",
        "from loraflow.evaluation.harness.code_eval import SandboxedCodeEval\ndef f(x): return SandboxedCodeEval()",
        "from loraflow.evaluation.paper.problems import score_code\ndef f(x): return score_code(x, [])",
        "import sandboxed\ndef f(x): return sandboxed.run(x)",
    ],
)
def test_tasks_that_use_the_sandbox(tmp_path, monkeypatch, text):
    (tmp_path / "sandboxed.py").write_text("from loraflow.evaluation.sandbox import run_tests as run")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sandboxed", raising=False)
    checked(monkeypatch, module_of(tmp_path, text))


def test_the_papers_own_scoring_uses_the_sandbox():
    functions = {"custom_dataset": problems.load_code, "process_results": problems.score_code}
    code_check.check_code_task("loraflow_zh_code", functions, code_eval.Replacement())


@pytest.mark.parametrize(
    "text",
    [
        "from loraflow.evaluation.scoring import same_number\ndef f(x): return same_number(x, '1')",
        "from loraflow.evaluation import scoring\ndef f(x): return scoring.last_number(x)",
        "from loraflow.evaluation.sandbox import Limits\ndef f(x): return Limits()",
    ],
)
def test_what_else_is_of_the_evaluation_is_no_sandbox(tmp_path, monkeypatch, text):
    with pytest.raises(SandboxError, match=r"uses neither `code_eval` nor `loraflow\.evaluation\.sandbox`"):
        checked(monkeypatch, module_of(tmp_path, text))


@pytest.mark.parametrize("how", ["import helpers", "from helpers import run", "def g():\n    import helpers"])
def test_modules_beside_a_task_are_read_too(tmp_path, monkeypatch, how):
    (tmp_path / "helpers.py").write_text("import deeper\ndef run(x): return deeper.run(x)")
    (tmp_path / "deeper.py").write_text("from os import system\ndef run(x): return system(x)")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("helpers", "deeper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    text = f"from loraflow.evaluation.sandbox import run_tests\n{how}\ndef f(x): return run_tests(x, ['f()'])"
    with pytest.raises(SandboxError, match=r"'local' is refused: deeper runs code by `os\.system`, outside"):
        checked(monkeypatch, module_of(tmp_path, text))


def test_source_that_cannot_be_read_is_refused(tmp_path):
    module = module_of(tmp_path, "def f(x): return x")
    del module.__file__
    assert code_check.own_means(module) == "means that cannot be read"


def test_only_code_eval_is_replaced(monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda path, *_, **__: f"stock {path}")
    with sandboxed_code_eval("t", allow_code=True) as replacement:
        assert evaluate.load("rouge") == "stock rouge"
        assert not replacement.asked
        monkeypatch.setattr(code_eval, "_check_available", lambda: None)
        for path in ("code_eval", "evaluate-metric/code_eval", "/metrics/code_eval/code_eval.py"):
            assert isinstance(evaluate.load(path, module_type="metric"), SandboxedCodeEval)
        assert replacement.asked
    assert evaluate.load("code_eval") == "stock code_eval"
    refuses = pytest.raises(SandboxError, match=r"The task 't' runs programs that a model wrote")
    with sandboxed_code_eval("t", allow_code=False), refuses:
        evaluate.load("code_eval")


@pytest.mark.usefixtures("sandbox")
def test_code_eval_keeps_the_contract():
    scores, outcomes = SandboxedCodeEval().compute(
        references=["assert add(2, 3)==5", "assert f() == 1"],
        predictions=[
            ["def add(a,b): return a*b", "def add(a, b): return a+b"],
            ["def f():\n    while True: pass", "def f(): return 2", "def f(): return 1"],
        ],
        k=[1, 2, 3],
        timeout=1,
    )
    assert scores == {"pass@1": pytest.approx((1 / 2 + 1 / 3) / 2), "pass@2": pytest.approx((1 + 2 / 3) / 2)}
    records = [[record for _, record in outcomes[task]] for task in (0, 1)]
    assert [[record["passed"] for record in row] for row in records] == [[False, True], [False, False, True]]
    assert records[1][0] == {"task_id": 1, "passed": False, "result": "timed out", "completion_id": 0}
    assert records[0][0]["result"] == "failed: AssertionError in assert add(2, 3)==5"
    assert records[0][1]["result"] == "passed"


@pytest.mark.parametrize(
    ("total", "correct", "k", "expected"), [(5, 0, 1, 0), (5, 5, 3, 1), (4, 1, 2, 0.5), (2, 1, 2, 1)]
)
def test_pass_at_k(total, correct, k, expected):
    assert pass_at_k(total, correct, k) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------- the paper's tasks


def test_missing_paper_data(model, monkeypatch, tmp_path):
    monkeypatch.delenv("LORAFLOW_PAPER_DATA", raising=False)
    with pytest.raises(DataError, match=r"LORAFLOW_PAPER_DATA is not set\. Clone https://github\.com/thunlp/LoRAFlow"):
        evaluate_task(model, "loraflow_zh_math")
    monkeypatch.setenv("LORAFLOW_PAPER_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"LORAFLOW_PAPER_DATA \(='.*'\) has no `system_prompts\.json` in it\. Clone"):
        evaluate_task(model, "loraflow_zh_math")
    (tmp_path / "system_prompts.json").write_text('{"zh_math": "x"}')
    with pytest.raises(DataError, match=r"The paper's data has no file .*zh_math_test\.jsonl\. Clone"):
        evaluate_task(model, "loraflow_zh_math")


INSTRUCTIONS = {
    "zh": "为这个问题创建一个Python脚本",
    "ru": "Создайте Python скрипт для этой задачи.",
    "es": "Crear un script de Python para este problema",
}


@needs_paper
@pytest.mark.parametrize("language", ["zh", "ru", "es"])
def test_paper_math(language):
    manager = lm_eval.tasks.TaskManager(include_path=str(PAPER_TASKS), include_defaults=False)
    name = f"loraflow_{language}_math"
    task = manager.load([name])["tasks"][name]
    record = json.loads((PAPER / "test" / f"{language}_math_test.jsonl").read_text().split("\n")[0])
    system = json.loads((PAPER / "system_prompts.json").read_text())[f"{language}_math"]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{record['question']} [/INST]"
    assert task.doc_to_target(doc) == record["answer"] == "18"
    assert (len(task.eval_docs), len(task.validation_docs())) == (250, 100)
    assert task.config.generation_kwargs == {"until": [], "do_sample": False, "max_gen_toks": 512}
    right, unsure = task.process_results(doc, ["9 * 2 = 18"]), task.process_results(doc, ["Total: 18."])
    assert right == {"exact_match": 1.0, "official_exact_match": 1.0}
    assert unsure == {"exact_match": 1.0, "official_exact_match": 0.0}


@needs_paper
@pytest.mark.parametrize("language", ["zh", "ru", "es"])
def test_paper_code(language):
    folder = {"loraflow_paper_data": str(PAPER)}
    manager = lm_eval.tasks.TaskManager(include_path=str(PAPER_TASKS), include_defaults=False, metadata=folder)
    name = f"loraflow_{language}_code"
    task = manager.load([name])["tasks"][name]
    record = json.loads((PAPER / "test" / f"{language}_code_test.jsonl").read_text().split("\n")[0])
    text = task.doc_to_text(task.eval_docs[0])
    shown = record["prompt"].strip().replace("    ", "\t")
    assert text == f"[INST]{INSTRUCTIONS[language]}:\n{shown}\n\n[/INST]"
    dev = json.loads((PAPER / "dev" / f"{language}_code_dev.jsonl").read_text().split("\n")[0])
    tests = "\n".join(dev["test_list"])
    expected = f'"""[INST]{INSTRUCTIONS[language]}: {dev["text"]}[/INST]\n{tests}"""'
    assert task.doc_to_text(task.validation_docs()[0]) == expected
    assert (len(task.eval_docs), len(task.validation_docs())) == (164, 20)
    assert task.UNSAFE_CODE is True


@needs_paper
@pytest.mark.usefixtures("sandbox")
def test_paper_solutions_pass_and_others_fail():
    docs = list(problems.load_code("zh", loraflow_paper_data=str(PAPER))["test"])
    # With helpers in the prompt, functions inside, and imports.
    chosen = [doc for doc in docs if int(doc["id"].partition("/")[2]) in (0, 2, 6, 10, 32, 38, 50, 115, 129, 162)]
    assert len(chosen) == 10
    answers = {
        "continued": lambda doc: doc["solution"],
        "fenced": lambda doc: f"代码如下：\n```python\n{doc['solution']}```\n完成。",
        "in full": lambda doc: f"```python\n{doc['stub'].rstrip()}\n{doc['solution']}```".replace("    ", "\t"),
        "stripped": lambda doc: doc["solution"].strip() + "\n\n这个函数返回结果。",
        "nothing": lambda doc: "我不知道。",
    }
    for how, answer in answers.items():
        programs = [
            (f"{doc['setup']}\n{problems.program_of(answer(doc), doc['stub'], doc['entry_point'])}", doc["tests"])
            for doc in chosen
        ]
        passed = [result.passed for result in run_many(programs)]
        assert passed == [how != "nothing"] * len(chosen), how
    assert problems.score_code(chosen[0], [chosen[0]["solution"]]) == {"pass@1": 1.0}
    dev = problems.load_code("zh", loraflow_paper_data=str(PAPER))["dev"][0]
    assert problems.score_code(dev, [dev["solution"]]) == {"pass@1": 1.0}


@needs_paper
@pytest.mark.usefixtures("sandbox")
def test_paper_task_from_answer_to_score(model, tmp_path, monkeypatch):
    for name in ("loraflow_zh_math", "loraflow_zh_code"):
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {PAPER_TASKS}/{name}.yaml\ntask: short_{name}\n"
            "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 4}\n"
        )
        result = evaluate_task(model, f"short_{name}", include_path=tmp_path, limit=2, allow_code=True)
        assert result.metric == ("exact_match" if "math" in name else "pass@1")
        assert result.items[0].prompt.startswith("[INST]")
        right = ["答案是：18", "3"] if "math" in name else [item.target for item in result.items]
        items = [dataclasses.replace(i, responses=[[text]]) for i, text in zip(result.items, right, strict=True)]
        scored = rescore_task(dataclasses.replace(result, items=items), include_path=tmp_path, allow_code=True)
        assert scored.aggregate[scored.metric] == 1.0


def test_setup_is_what_the_stub_takes_for_granted():
    stub = "import math\nfrom typing import List\n\ndef poly(x):\n    return math.sqrt(x)\n\ndef f(x):\n    '''...'''\n"
    assert problems.setup_of(stub, "f") == "import math\nfrom typing import List\ndef poly(x):\n    return math.sqrt(x)"
    # A translated name: the last function is the one to write.
    assert "poly" in problems.setup_of(stub, "renamed")
    assert "def f" not in problems.setup_of(stub, "renamed")
    assert problems.setup_of("из typing импортировать List\nimport math\n\nфункция f(x):\n", "f") == "import math"
    assert problems.setup_of("import broken from\nfunción f(x):\n", "f") == ""


STUB = 'def f(x):\n    """Double."""\n'


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ("    return 2 * x\n", "    return 2 * x"),
        ("return 2 * x", "    return 2 * x"),
        ("\treturn 2 * x", "    return 2 * x"),
        ("y = x\n    return 2 * y", "    y = x\n    return 2 * y"),
        ("y = x\nreturn 2 * y", "    y = x\n    return 2 * y"),
        ("    return 2 * x\n\nЭто удвоение числа.", "    return 2 * x"),
        ("def g(y):\n        return y\n    return 2 * g(x)", "    def g(y):\n        return y\n    return 2 * g(x)"),
        ("```python\nreturn 2 * x\n```\nListo.", "    return 2 * x"),
        ("    return 2 * x\r\n", "    return 2 * x"),
    ],
)
def test_bodies_continue_the_stub(answer, body):
    assert problems.program_of(answer, STUB, "f") == f"{STUB}{body}"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f(x):\n\treturn 2 * x", "def f(x):\n    return 2 * x"),
        ("Так:\n```python\nf = lambda x: 2 * x\n```", "f = lambda x: 2 * x"),
        ("import math\n\n\nasync def f(x):\n    return x", "import math\n\n\nasync def f(x):\n    return x"),
    ],
)
def test_whole_programs_stand_alone(answer, program):
    assert problems.program_of(answer, STUB, "f") == program


def test_without_a_stub_the_answer_is_the_program():
    assert problems.program_of("def g(x):\n    return x", "", "") == "def g(x):\n    return x"


def test_the_paper_tasks_are_files_of_the_package():
    names = sorted(path.stem for path in PAPER_TASKS.glob("loraflow_*.yaml"))
    languages = ("es", "ru", "zh")
    assert names == [f"loraflow_{language}_{skill}" for language in languages for skill in ("code", "math")]
