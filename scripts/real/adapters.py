"""A LoRA for a task, trained with plain PEFT and transformers' Trainer, as anybody would."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 0


def train_adapter(
    base: Path, examples: list[dict[str, str]], directory: Path, *, batch_size: int = 8, learning_rate: float = 2e-3
) -> float:
    """Train on the examples once; returns the mean loss of the last steps."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    trainer = Trainer(
        model,
        TrainingArguments(
            # Nothing is written there.
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        ),
        train_dataset=[_tokens(tokenizer, example) for example in examples],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(directory)
    return float(next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry))


def _tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of a conversation; the loss counts those of the answer and of what ends its turn."""
    question = [{"role": "user", "content": example["prompt"]}]
    answer = [{"role": "assistant", "content": example["completion"]}]
    options: dict[str, Any] = {"tokenize": False}
    prompt = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, **options))
    whole = str(tokenizer.apply_chat_template(question + answer, **options))
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False)["input_ids"]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}
