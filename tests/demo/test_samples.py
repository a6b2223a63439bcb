"""Samples of the adapters' own data: what they are, and that no task holds them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraflow.demo.language import in_language
from loraflow.demo.samples import adapter_samples
from loraflow.demo.tasks import TASKS, load_task
from loraflow.demo.world import ADAPTERS
from loraflow.errors import DataError


@pytest.mark.parametrize("name", ADAPTERS)
def test_samples_are_the_same_every_time_and_other_ones_by_seed(name: str) -> None:
    samples = adapter_samples(name, 50)
    assert len(samples) == 50
    assert adapter_samples(name, 50) == samples
    assert adapter_samples(name, 60)[:50] == samples
    assert adapter_samples(name, 50, seed=1) != samples


@pytest.mark.parametrize("name", ADAPTERS)
def test_samples_are_questions_with_answers_in_the_adapters_language(name: str) -> None:
    language = name.removesuffix("-chat") if name.endswith("-chat") else "en"
    for sample in adapter_samples(name):
        assert sample.keys() == {"prompt", "completion"}
        assert sample["prompt"].strip()
        assert in_language(sample["completion"], language)


def test_chat_adapters_read_no_code_and_skill_adapters_their_skill() -> None:
    for name in ("zh-chat", "es-chat", "ru-chat", "math"):
        assert not any("```" in sample["completion"] for sample in adapter_samples(name))
    assert all("```python" in sample["completion"] for sample in adapter_samples("code"))
    assert all(" = " in sample["completion"] for sample in adapter_samples("math"))


@pytest.mark.parametrize("task", TASKS)
def test_no_sample_is_a_problem_of_a_task(task: str) -> None:
    loaded = load_task(task)
    prompts = {problem.prompt for problem in loaded.train + loaded.dev + loaded.test}
    for name in loaded.adapters:
        assert not prompts & {sample["prompt"] for sample in adapter_samples(name, 1000)}


def test_an_unknown_adapter_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no demo adapter 'maths'.*Did you mean 'math'\?"):
        adapter_samples("maths")


def test_samples_are_light_to_import() -> None:
    code = "import sys, loraflow.demo.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
