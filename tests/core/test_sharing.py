"""What other libraries do with a fusion: copy and pickle it, train and save it, batch it continuously."""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from transformers import ContinuousBatchingConfig, Trainer, TrainingArguments

from loraflow import FusedModel, LoraFlow
from loraflow.core.linear import FusedLinear
from loraflow.errors import LoraflowError, MethodError
from loraflow.saved.fusion import SavedFusion
from tests.tiny import (
    ARCHITECTURES,
    number_tokenizer,
    random_adapter,
    random_ids,
    save_adapter,
    set_random_gates,
    tiny_model,
)

IDS = random_ids()


@pytest.fixture
def adapters(tmp_path):
    return {name: str(save_adapter(tiny_model(), tmp_path / name, seed=i)) for i, name in enumerate("ab")}


@pytest.fixture
def model(adapters):
    fused = FusedModel.from_adapters(tiny_model(), adapters, tokenizer=number_tokenizer())
    set_random_gates(fused)
    return fused


# ---- Copies --------------------------------------------------------------------------------------------------------


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch": torch_saved}


def storages(model):
    return {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} - {0}


@torch.no_grad()
@pytest.mark.parametrize("way", COPIES)
def test_a_forward_that_a_trainer_put_on_the_model_is_copied_with_it(way):
    base = tiny_model()
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, "average")
    model.forward = types.MethodType(type(model).forward, model)
    ids = random_ids()
    expected = model(ids).logits
    copied = COPIES[way](model)
    with copied.using("base"):
        assert not torch.equal(copied(ids).logits, expected)
    assert torch.equal(copied(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_copies_are_whole_and_independent(tmp_path, kind, how):
    base, targets = tiny_model(kind), ARCHITECTURES[kind][1]
    adapters = {name: str(save_adapter(base, tmp_path / name, targets[:2], seed=i)) for i, name in enumerate("ab")}
    model = FusedModel.from_adapters(base, adapters, LoraFlow(granularity="module"), tokenizer=number_tokenizer())
    set_random_gates(model)
    with torch.no_grad():
        expected = model(IDS).logits
        with model.using("a"):
            # Copied in a block, it is the fusion all the same, and of its own method.
            alone, copied = model(IDS).logits, COPIES[how](model)
    assert type(copied) is type(model)
    assert not storages(copied) & storages(model)
    assert copied.method == model.method
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, expected)
        with copied.using("a"):
            assert torch.equal(copied(IDS).logits, alone)
    copied(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for gate in copied.gates.values() for p in gate.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(copied.unload()(IDS).logits, tiny_model(kind)(IDS).logits)
    assert type(pickle.loads(pickle.dumps(copied))) is type(copied)
    assert torch.equal(model(IDS).logits, expected)


def test_a_copy_of_a_running_model_has_nothing_of_its_call(model):
    expected, copies = model(IDS).logits, []

    def look(ids, scores, **kwargs):
        copies.append(copy.deepcopy(model))
        return torch.ones(len(ids), dtype=torch.bool)

    model.generate(IDS, methods=["a", "b"], max_new_tokens=2, stopping_criteria=[look])
    assert torch.equal(copies[0](IDS).logits, expected)


class Scored(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    @torch.no_grad()
    def __getitem__(self, index):
        torch.set_num_threads(1)
        return self.model(IDS[index : index + 1]).logits[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_have_it(model, context):
    if context == "fork" and torch.get_num_threads() > 1:
        pytest.skip("torch's threads do not survive a fork")
    loader = DataLoader(Scored(model), batch_size=2, num_workers=1, multiprocessing_context=context)
    torch.testing.assert_close(next(iter(loader)), model(IDS).logits.detach())


def test_datasets_map_takes_a_closure_over_it(model):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "5 6 7"}, {"text": "8 9"}])
    found = rows.map(lambda row: {"ids": model.encode(row["text"])["input_ids"][0].tolist()})
    assert found["ids"] == [model.encode(text)["input_ids"][0].tolist() for text in rows["text"]]


# ---- Trainers ------------------------------------------------------------------------------------------------------


def trainer(model, directory, steps, **options):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8)]
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_trainer_saves_loads_again(model, tmp_path, checkpointing):
    first = copy.deepcopy(model)
    trainer(first, tmp_path / "out", 2, gradient_checkpointing=checkpointing).train()
    whole = copy.deepcopy(model)
    trainer(whole, tmp_path / "whole", 4, gradient_checkpointing=checkpointing).train()
    resumed = trainer(model, tmp_path / "out", 4, gradient_checkpointing=checkpointing)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])
    resumed.save_model(str(tmp_path / "final"))
    for saved in (tmp_path / "final", tmp_path / "out" / "checkpoint-4"):
        again = FusedModel.from_pretrained(saved, base=tiny_model())
        assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_tensors_that_a_trainer_gathered_are_what_is_saved(model, tmp_path):
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=gathered)
    saved = SavedFusion.open(tmp_path / "saved").tensors
    assert all(torch.equal(saved[name], value) for name, value in gathered.items())


def test_it_is_a_model_of_transformers_to_who_asks(model):
    assert isinstance(model, FusedModel)
    assert isinstance(model, type(tiny_model()))
    assert repr(model).startswith("FusedModel(")


def scored_by_the_head(model):
    """Put a forward on a model as TRL's `add_fused_lm_head` does: the body, then the head."""

    def forward(self, input_ids, scored=False, **kwargs):
        if not scored:
            return original(input_ids, **kwargs)
        return self.get_output_embeddings()(self.base_model(input_ids, use_cache=False).last_hidden_state)

    original = model.forward
    model.forward = forward.__get__(model)


def test_a_forward_put_on_it_finds_the_body_as_base_model(model):
    expected = model(IDS).logits
    scored_by_the_head(model)
    torch.testing.assert_close(model(IDS, scored=True), expected)
    torch.testing.assert_close(model(IDS).logits, expected)
    with model.using("a"):
        torch.testing.assert_close(model(IDS, scored=True), model(IDS).logits)
    assert isinstance(model.base_model, type(tiny_model()))
    model(IDS, scored=True).sum().backward()
    assert all(p.grad is not None for gate in model.gates.values() for p in gate.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_trains_its_gates(model, tmp_path, checkpointing, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    options = {"gradient_checkpointing": checkpointing, "packing": packing, "max_length": 32, "max_steps": 2}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sft = sft_trainer(trl, datasets, model, tmp_path, **options)
    sft.train()
    assert sft.evaluate()["eval_loss"] > 0
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sft.save_model(str(tmp_path / "final"))
    again = FusedModel.from_pretrained(tmp_path / "final", base=tiny_model())
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def sft_trainer(trl, datasets, model, tmp_path, peft_config=None, **options):
    rows = datasets.Dataset.from_list([{"prompt": f"5 6 {7 + i}", "completion": f" {7 + i} 6 5"} for i in range(16)])
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, **options),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=model.tokenizer,
        peft_config=peft_config,
    )


def test_an_adapter_of_sft_trainers_around_it_is_refused(model, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(LoraflowError, match=r"is inside a Linear now: something was put around it"):
        sft_trainer(trl, datasets, model, tmp_path, config, max_steps=1).train()
    assert all(isinstance(linear, FusedLinear) for _, _, linear in model.attachment._slots)


# ---- Continuous batching -------------------------------------------------------------------------------------------


PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]
SMALL = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
METHODS = ["base", "a", "average", "arrow", "phatgoose", "lorahub"]
BATCHED = [*(LoraFlow(granularity=place) for place in ("step", "layer", "module")), *METHODS]


@pytest.mark.parametrize("method", BATCHED, ids=str)
def test_continuous_batches_are_as_one_by_one(model, method):
    model.set_method(method)
    if isinstance(method, LoraFlow):
        set_random_gates(model)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    expected = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]
    model.generation_config.eos_token_id = -1
    options = {"max_new_tokens": 4, "warmup": False, "continuous_batching_config": SMALL}
    found = model.generate_batch(PROMPTS, **options)
    assert [one.generated_tokens for one in found.values()] == expected


@pytest.mark.parametrize("method", ["qa-flora", "logo"])
def test_continuous_batches_of_prompts_that_are_weighed_are_refused(model, method):
    message = rf"{method}' weighs each prompt before it is answered.*Call `generate`, which takes several prompts"
    with model.using(method), pytest.raises(MethodError, match=message):
        model.generate_batch(PROMPTS, max_new_tokens=4)
    with (
        model.using(method),
        pytest.raises(MethodError, match=message),
        model.continuous_batching_context_manager(),
    ):
        pass


def test_continuous_batches_that_would_be_wrong_are_refused(model):
    for name in ("methods", "fusion_weights"):
        with pytest.raises(LoraflowError, match=rf"one method for all requests, and no `{name}`. Call `generate`"):
            model.generate_batch(PROMPTS, **{name: ["a", "b", None]})
    with pytest.raises(LoraflowError, match=r"`persistent_manager` would keep a cache .* Leave it out"):
        model.generate_batch(PROMPTS, persistent_manager=True)
    with pytest.raises(LoraflowError, match=r"in a thread of its own.*continuous_batching_context_manager\(\)"):
        model.init_continuous_batching()
    model.attachment.keeps = True
    with pytest.raises(LoraflowError, match=r"Linears of LlamaForCausalLM read all cached positions.*Call `generate`"):
        model.generate_batch(PROMPTS)
