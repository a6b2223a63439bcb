"""Recipes: what a field may be, files of them, and transformers' `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from transformers import TrainingArguments

from loraflow import FitConfig
from loraflow.errors import DataError, LoraflowError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "five"}, r"`epochs` \(='five'\) must be a number"),
        ({"learning_rate": None}, r"`learning_rate` \(=None\) must be a number"),
        ({"batch_size": True}, r"`batch_size` \(=True\) must be a number"),
        ({"batch_size": 2.5}, r"`batch_size` \(=2\.5\) must be a whole number"),
        ({"max_steps": 1.5}, r"`max_steps` \(=1\.5\) must be a whole number"),
        ({"max_length": [8]}, r"`max_length` \(=\[8\]\) must be a number"),
        ({"betas": 0.9}, r"`betas` \(=0\.9\) must be two numbers"),
        ({"betas": "ab"}, r"`betas` \(='ab'\) must be two numbers"),
        ({"betas": (0.9, "b")}, r"`betas` \(='b'\) must be a number"),
        ({"gradient_checkpointing": "yes"}, r"`gradient_checkpointing` \(='yes'\) must be True or False"),
        ({"seed": -1}, r"`seed` \(=-1\) must be at least 0 and less than 2\*\*32"),
        ({"keep_last": 0}, r"`keep_last` \(=0\) must be at least 1"),
        ({"early_stopping": 0}, r"`early_stopping` \(=0\) must be at least 1"),
        ({"schedule": "cosin"}, r"`schedule` is unknown: 'cosin'\. Known: .*Did you mean 'cosine'\?"),
        ({"report_to": "tensorbord"}, r"`report_to` is unknown: 'tensorbord'\. .*Did you mean 'tensorboard'\?"),
        ({"report_to": 3}, r"`report_to` \(=3\) must be names of trackers"),
    ],
)
def test_what_is_no_recipe_says_so(settings, message):
    with pytest.raises(LoraflowError, match=message):
        FitConfig(**settings)


def test_two_spellings_of_one_recipe_are_equal():
    given = FitConfig(betas=[0.9, 0.95], batch_size=np.int64(4), learning_rate=np.float32(0.5), report_to="wandb")
    assert given == FitConfig(learning_rate=0.5, report_to=("wandb",))
    assert type(given.batch_size) is int
    assert type(given.learning_rate) is float


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text("learning-rate: 1e-2\nbetas: [0.8, 0.9]\nmax_steps: null\n")
    assert FitConfig.from_yaml(path, epochs=2) == FitConfig(learning_rate=0.01, betas=(0.8, 0.9), epochs=2)
    path.write_text("base: some/base\nrecipe:\n  epochs: 7\n")
    assert FitConfig.from_yaml(str(path)) == FitConfig(epochs=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"fit\.yaml: a recipe has no 'learning_rat'\. Known: .*Did you mean 'learning_rate'\?"),
        ("recipe: 3", r"fit\.yaml: a recipe holds fields, as `name: value`, and no 3\."),
        ("- 1", r"fit\.yaml holds list, and should hold fields"),
        ("a: [", r"fit\.yaml cannot be read as YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "fit.yaml"
    path.write_text(text)
    with pytest.raises(LoraflowError, match=message):
        FitConfig.from_yaml(path)
    with pytest.raises(DataError, match="cannot be read"):
        FitConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "config",
    [
        FitConfig(),
        FitConfig(max_steps=7, batch_size=8, gradient_accumulation=2, checkpoint_steps=3, keep_last=5, seed=9),
        FitConfig(schedule="linear", warmup=0.0, betas=(0.8, 0.9), weight_decay=0.0, max_grad_norm=0.0),
        FitConfig(schedule="constant", gradient_checkpointing=True, learning_rate=0.5, epsilon=1e-8),
    ],
)
def test_training_arguments_there_and_back(tmp_path, config):
    arguments = config.training_arguments(tmp_path, use_cpu=True)
    assert arguments.use_cpu
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == config.batch_size
    assert FitConfig.from_training_arguments(arguments) == config


def test_the_usual_training_arguments_are_a_recipe(tmp_path):
    usual = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    config = FitConfig.from_training_arguments(usual, adapter_dropout=0.1)
    assert (config.learning_rate, config.schedule, config.warmup) == (5e-5, "linear", 0.0)
    assert (config.epochs, config.batch_size, config.checkpoint_steps) == (3, 8, 500)
    assert config.adapter_dropout == 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` \(=0\.1\) has no counterpart.*Leave it at 0\.0"),
        ({"neftune_noise_alpha": 5.0}, r"`neftune_noise_alpha` \(=5\.0\) has no counterpart"),
        ({"optim": "sgd"}, r"`optim` \(='sgd'\) is none that a fit has: adamw_torch"),
        ({"lr_scheduler_type": "polynomial"}, r"`lr_scheduler_type` \(='polynomial'\) is none that a fit has: cosine"),
        ({"warmup_steps": 100}, r"`warmup_steps` \(=100\) is a number of steps, and a recipe has a share"),
        ({"num_train_epochs": 2.5}, r"`epochs` \(=2\.5\) must be a whole number"),
    ],
)
def test_training_arguments_that_no_recipe_has(tmp_path, given, message):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)
    with pytest.raises(LoraflowError, match=message):
        FitConfig.from_training_arguments(arguments)


def test_unknown_overrides_are_named(tmp_path):
    with pytest.raises(LoraflowError, match=r"`TrainingArguments` has no 'use_cp'.*Did you mean 'use_cpu'"):
        FitConfig().training_arguments(tmp_path, use_cp=True)


def test_every_field_of_a_recipe_is_there_and_back():
    """A field that is added is to be in `training_arguments`, or here."""
    alone = {
        "min_steps",
        "packing",
        "adapter_dropout",
        "train_on",
        "max_length",
        "score_max_new_tokens",
        "early_stopping",
    }
    from loraflow.training.arguments import settings_of

    arguments = FitConfig().training_arguments("out", use_cpu=True)
    assert {field.name for field in dataclasses.fields(FitConfig)} == settings_of(arguments).keys() | alone
    assert math.isfinite(arguments.learning_rate)


@pytest.mark.parametrize(
    ("settings", "examples", "epochs"),
    [({}, 200, 5), ({"min_steps": 125}, 200, 5), ({"min_steps": 125}, 20, 25), ({"min_steps": 7, "epochs": 1}, 9, 3)],
)
def test_few_examples_are_passed_over_more_often(settings, examples, epochs):
    assert FitConfig(**settings).epochs_over(examples) == epochs


def test_steps_are_at_least_none():
    with pytest.raises(LoraflowError, match=r"`min_steps` \(=-1\) must be at least 0, and finite"):
        FitConfig(min_steps=-1)


def test_a_word_is_no_list():
    with pytest.raises(LoraflowError, match=r"`schedule` \(=\[\]\) must be a word, such as 'cosine'"):
        FitConfig(schedule=[])


def test_fits_from_before_a_field_was_there_are_as_by_its_default():
    assert "packing" not in FitConfig().identity()
    assert FitConfig(packing=True).identity() == {**FitConfig().identity(), "packing": True}
    assert FitConfig(keep_last=9, report_to="wandb").identity() == FitConfig().identity()
    assert FitConfig(epochs=9).identity() != FitConfig().identity()
