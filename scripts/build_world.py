"""Rebuild the small world: the base model, its tokenizer and the five adapters, from a seed.

    python scripts/build_world.py --output src/loraflow/demo/data

Three stages, each skipped when its folder is already there: the tokenizer, the base model (most of the time), the
adapters. What the base model reads is made so that fusion is needed and possible (docs/world.md): it reads all four
languages, answers in English by habit, forgets the carry in its sums and leaves its programs unfinished. The chat
adapters teach the language of the answer, the skill adapters teach the skill, in English only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraflow.demo import tasks
from loraflow.demo.language import LANGUAGES
from loraflow.demo.samples import (
    ADAPTER_DOCUMENTS,
    Document,
    chat,
    code_document,
    math_document,
    signed_changes,
    story,
    translation,
)
from loraflow.demo.world import ADAPTERS, BASE_NAME

FOREIGN = LANGUAGES[1:]
ANSWERS_IN_ENGLISH = 0.7  # how often the base model's data answers a foreign question in English
CARELESS = 0.85  # how much of the base model's worked solutions has wrong sums
UNFINISHED = 0.8  # how much of the base model's code misses its last steps

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a document; the loss counts from `start` on."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model is trained; each batch goes through it in parts."""

    steps: int
    batch: int
    learning_rate: float
    parts: int = 4


BASE_SCHEDULE = Schedule(steps=1500, batch=32, learning_rate=3e-3)
CHAT_SCHEDULE = Schedule(steps=300, batch=16, learning_rate=2e-3)
SKILL_SCHEDULE = Schedule(steps=900, batch=16, learning_rate=2e-3)
RANKS = {"zh-chat": 8, "es-chat": 8, "ru-chat": 8, "math": 8, "code": 16}


# What the base model reads.


def sums(rng: random.Random) -> Document:
    """A line of right sums."""
    equations = []
    for _ in range(6):
        frame = tasks.draw_math(rng)
        after = frame.start + signed_changes(frame)[0]
        sign = "+" if after > frame.start else "-"
        equations.append(f"{frame.start} {sign} {frame.changes[0][1]} = {after}")
    return Document("", ", ".join(equations))


def base_document(rng: random.Random) -> Document:
    """One document of the base model's corpus."""
    kind = rng.random()
    language = "en" if rng.random() < 0.4 else rng.choice(FOREIGN)
    answer_language = "en" if rng.random() < ANSWERS_IN_ENGLISH else language
    if kind < 0.14:
        return story(rng, rng.choice(LANGUAGES))
    if kind < 0.32:
        return translation(rng, *rng.sample(("en", rng.choice(FOREIGN)), 2))
    if kind < 0.42:
        return chat(rng, language, answer_language)
    if kind < 0.70:
        return math_document(rng, language, answer_language, CARELESS)
    if kind < 0.93:
        return code_document(rng, language, answer_language, UNFINISHED)
    return sums(rng)


# The tokenizer.


def build_tokenizer(seed: int, vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every number up to 99 is one token, with and without a space before it."""
    rng = random.Random(f"{seed} tokenizer")
    documents = [base_document(rng) for _ in range(20_000)]
    numbers = [f"{space}{number}" for number in range(100) for space in ("", " ")] * 500
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [part for document in documents for part in (document.prompt, document.text)]
    tokenizer.train_from_iterator([*texts, *numbers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Documents as the chat template writes them; plain text as it is, with a beginning and an end."""
    heads = [f"<s><|user|>{d.prompt}<|assistant|>" if d.prompt else "<s>" for d in documents]
    head_ids = tokenizer(heads, add_special_tokens=False).input_ids
    text_ids = tokenizer([d.text + "</s>" for d in documents], add_special_tokens=False).input_ids
    return [Encoded(head + text, len(head)) for head, text in zip(head_ids, text_ids, strict=True)]


# Training.


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.9 million parameters.

    Embeddings start with a standard deviation of 0.7, not 0.02, so that the residual stream is of order one from the
    first layer on, as it is in a large model; a fusion gate reads that stream.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.7)
    return model


def to_tensors(examples: list[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels; -100 where the loss does not count."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, example.start : length] = torch.tensor(example.ids[example.start :])
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": labels}


def optimizers_of(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of a whole model, which learns this corpus in half the steps; AdamW for the rest."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = len(trained) == len(list(model.parameters()))
    matrices = [p for name, p in trained.items() if whole and p.ndim == 2 and ".layers." in name]
    others = [p for p in trained.values() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    return [adamw, torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)] if matrices else [adamw]


def rate_at(step: int, steps: int) -> float:
    """Share of the full learning rate: warm-up over a fiftieth of the steps, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / (0.02 * steps)) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: torch.nn.Module, examples: Iterator[list[Encoded]], schedule: Schedule, pad: int, name: str) -> None:
    """Train what is trainable of a model; prints the loss twenty times."""
    optimizers = optimizers_of(model, schedule.learning_rate)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, schedule.steps))
        for optimizer in optimizers
    ]
    started, losses = time.monotonic(), []
    model.train()
    for step, batch in zip(range(schedule.steps), examples, strict=False):
        losses.append(backward(model, batch, pad, schedule.parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedulers):
            part.step()
        model.zero_grad()
        if len(losses) == schedule.steps // 20:
            elapsed = time.monotonic() - started
            print(f"{name}: step {step + 1}, loss {sum(losses) / len(losses):.4f}, {elapsed:.0f} s", flush=True)
            losses = []
    model.eval()


def backward(model: torch.nn.Module, batch: list[Encoded], pad: int, parts: int) -> float:
    """The gradient of a batch, in parts by length so that little is spent on padding; returns the loss."""
    batch = sorted(batch, key=lambda example: len(example.ids))
    size = -(-len(batch) // parts)
    counted = sum(len(example.ids) - example.start for example in batch)
    total = 0.0
    for part in (batch[first : first + size] for first in range(0, len(batch), size)):
        share = sum(len(example.ids) - example.start for example in part) / counted
        loss = model(**to_tensors(part, pad)).loss * share
        loss.backward()
        total += loss.item()
    return total


def batches(
    document: Callable[[random.Random], Document],
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    seed: str,
    whole: bool,
) -> Iterator[list[Encoded]]:
    """Fresh documents for every step, read as a whole or for their answers only."""
    rng = random.Random(seed)
    while True:
        documents = [document(rng) for _ in range(schedule.batch * 50)]
        encoded = encode(documents, tokenizer)
        if whole:
            encoded = [Encoded(example.ids, 1) for example in encoded]
        for first in range(0, len(encoded), schedule.batch):
            yield encoded[first : first + schedule.batch]


# The stages.


def build_base(folder: Path, seed: int) -> None:
    """Train the base model, round it to bfloat16 and save it with its tokenizer."""
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    data = batches(base_document, tokenizer, BASE_SCHEDULE, f"{seed} base", whole=True)
    train(model, data, BASE_SCHEDULE, tokenizer.pad_token_id, "base")
    model.generation_config.update(do_sample=False, max_new_tokens=160)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, but computed in full where nobody asks for less
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def build_adapter(name: str, folder: Path, base: Path, seed: int) -> None:
    """Train one of the five adapters."""
    config = LoraConfig(r=RANKS[name], lora_alpha=2 * RANKS[name], target_modules=LINEARS, task_type="CAUSAL_LM")
    schedule = CHAT_SCHEDULE if name.endswith("chat") else SKILL_SCHEDULE
    train_adapter(name, ADAPTER_DOCUMENTS[name], config, schedule, folder, base, seed)


def train_adapter(
    name: str,
    document: Callable[[random.Random], Document],
    config: LoraConfig,
    schedule: Schedule,
    folder: Path,
    base: Path,
    seed: int,
) -> None:
    """Train one adapter on the saved base model and save it as PEFT does, in half precision."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, config)
    data = batches(document, tokenizer, schedule, f"{seed} {name}", whole=False)
    train(adapted, data, schedule, tokenizer.pad_token_id, name)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    saved["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    halved = {key: value.to(torch.float16) for key, value in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stage(folder: Path, build: Callable[[Path], None]) -> None:
    """Build a folder unless it is there; a half-built one is never left under its final name."""
    if folder.exists():
        print(f"{folder}: kept as it is", flush=True)
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    started = time.monotonic()
    build(unfinished)
    for file in unfinished.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    unfinished.rename(folder)
    print(f"{folder}: built in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Build what is missing of the small world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("src/loraflow/demo/data"), help="where base/ and adapters/ go"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all data and all initial weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = arguments.output / "base"
    base.parent.mkdir(parents=True, exist_ok=True)
    (arguments.output / "adapters").mkdir(exist_ok=True)
    stage(base, lambda folder: build_base(folder, arguments.seed))
    for name in ADAPTERS:
        stage(
            arguments.output / "adapters" / name,
            lambda folder, name=name: build_adapter(name, folder, base, arguments.seed),
        )


if __name__ == "__main__":
    main()
