"""`FusedModel` as users and other libraries hold it."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer, Trainer, TrainingArguments, pipeline

import loraflow
from loraflow import Average, BaseOptions, FitConfig, FusedModel, LoraFlow, PromptFormat, Static
from loraflow.adapters import load_adapter
from loraflow.errors import AdapterError, ArchitectureError, DataError, LoraflowError, MethodError
from tests.tiny import (
    ALL_LLAMA,
    number_tokenizer,
    random_ids,
    relative_error,
    save_adapter,
    set_random_gates,
    tiny_model,
    use_reference,
)

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def adapters(tmp_path):
    base = tiny_model()
    return {
        "a": save_adapter(base, tmp_path / "a", r=4, seed=1),
        "b": save_adapter(base, tmp_path / "b", ["q_proj", "up_proj"], r=2, seed=2),
        "c": save_adapter(base, tmp_path / "c", r=3, lora_bias=True, seed=3),
    }


@pytest.fixture
def model(adapters):
    model = FusedModel.from_adapters(tiny_model(), adapters, tokenizer=number_tokenizer())
    set_random_gates(model)
    return model


def test_import_is_light_and_public_names_are_all_there():
    code = (
        "import sys, loraflow, loraflow.serving.config, loraflow.training.config; "
        "heavy = {'torch', 'transformers', 'peft', 'fastapi', 'matplotlib', 'vllm'} & set(sys.modules); "
        "assert not heavy, heavy; assert all(getattr(loraflow, name) for name in loraflow.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(loraflow._HOMES) < set(loraflow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = loraflow.Nothing


def test_the_model_s_class_loads_no_more_than_it_needs_and_says_nothing():
    code = (
        "import sys, loraflow; loraflow.FusedModel; heavy = {'bitsandbytes', 'fastapi', 'lm_eval', 'matplotlib', "
        "'nevergrad', 'peft', 'sklearn', 'transformers.trainer', 'vllm'} & set(sys.modules); assert not heavy, heavy"
    )
    # What loads an adapter imports PEFT.
    for run in (code, "import loraflow; loraflow.FusedModel; import peft"):
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_any_number_of_adapters(tmp_path):
    base = tiny_model()
    for k in (1, 5):
        adapters = {f"a{i}": save_adapter(base, tmp_path / f"{k}{i}", r=i + 1, seed=i) for i in range(k)}
        model = FusedModel.from_adapters(copy.deepcopy(base), adapters)
        assert model.trace(random_ids()).weights.shape == (2, 9, 3, k)
        assert model.adapter_names == list(adapters)


@torch.no_grad()
def test_using_is_for_a_while(model):
    ids = random_ids()
    before, weights = model(ids).logits, {name: gate.weight.clone() for name, gate in model.gates.items()}
    with model.using("average") as same:
        assert same is model
        assert not torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(model.gates[name].weight, weight) for name, weight in weights.items())
    with pytest.raises(RuntimeError, match="inside"), model.using("base"):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_adapters_are_exchanged_for_a_while(model, adapters, tmp_path):
    ids = random_ids()
    other = load_adapter("other", save_adapter(tiny_model(), tmp_path / "other", r=5, seed=4))
    alone = FusedModel.from_adapters(tiny_model(), {"other": other.source}, "other")(ids).logits
    before, gates, own = model(ids).logits, model.gates, model.adapters
    model.training_record = {"steps": 3}
    with model.exchanged([other]) as same, same.using("other"):
        assert same is model
        assert relative_error(model(ids).logits, alone) < 1e-6
    with model.exchanged([other]):
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    with pytest.raises(RuntimeError, match="inside"), model.exchanged([other]):
        raise RuntimeError("inside")
    misfit = load_adapter("misfit", save_adapter(tiny_model(hidden_size=48), tmp_path / "misfit", seed=5))
    with pytest.raises(AdapterError, match="'misfit'"), model.exchanged([misfit]):
        pass
    assert torch.equal(model(ids).logits, before)
    assert all(model.gates[name] is gate for name, gate in gates.items())
    assert model.adapters == own
    assert (model.method.name, model.training_record) == ("lora-flow", {"steps": 3})
    assert all(p.requires_grad for gate in model.gates.values() for p in gate.parameters())


@torch.no_grad()
@pytest.mark.parametrize("place", ["step", "layer", "module"])
def test_trace_is_what_the_forward_used(model, place):
    model.set_method(LoraFlow(granularity=place))
    set_random_gates(model)
    trace = model.trace(random_ids())
    assert trace.weights.shape == (2, 9, 3, 3)
    if place == "module":
        assert set(trace.module_weights) == {f"layers.{i}.{p}.{n}" for i in range(3) for p, n in _llama_names()}
        first = torch.stack([w for name, w in trace.module_weights.items() if name.startswith("layers.0.")]).mean(0)
        torch.testing.assert_close(trace.weights[:, :, 0], first)
    else:
        embeddings = model.get_input_embeddings()(random_ids())
        gate = model.gates["model" if place == "step" else "layers.0"]
        torch.testing.assert_close(trace.weights[:, :, 0], gate(embeddings))
    if place == "step":
        torch.testing.assert_close(trace.weights[:, :, 0], trace.weights[:, :, 2])


def _llama_names():
    return [("self_attn" if name[0] in "qkvo" else "mlp", name) for name in ALL_LLAMA]


def test_trace_needs_weights(model):
    with model.using("base"), pytest.raises(LoraflowError, match="'base', which has no fusion weights"):
        model.trace(random_ids())


@torch.no_grad()
def test_transformers_generation_features(model):
    ids = random_ids(1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    greedy = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), greedy)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=tiny_model(seed=7)), greedy)
    plain = tiny_model().generate(**inputs, **GREEDY)
    assert torch.equal(tiny_model().generate(**inputs, **GREEDY, assistant_model=model), plain)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, do_sample=True, max_new_tokens=8, num_return_sequences=3)
    assert sampled.shape[0] == 3
    beams = model.generate(**inputs, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **GREEDY, num_beams=3, use_cache=False))

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ids.shape[1] + 2)

    assert model.generate(**inputs, **GREEDY, stopping_criteria=[AfterTwo()]).shape[1] == ids.shape[1] + 2


def test_streamer(model, capsys):
    ids = random_ids(1)
    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, streamer=streamer)
    assert capsys.readouterr().out.strip()


def test_pipeline_takes_it_without_complaint(model, caplog):
    with caplog.at_level(logging.ERROR):
        generator = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
        text = generator("5 6 7", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert "not supported" not in caplog.text
    ids = model.tokenizer("5 6 7", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, 3:]
    assert text.split() == model.tokenizer.decode(expected).split()


def test_lm_eval_takes_it(model):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    lm = huggingface.HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=2)
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood", doc={}, arguments=("5 6 7", " 8 9"), idx=0)
    (found, _), *_ = lm.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    log_probabilities = model(ids).logits.log_softmax(-1)
    assert found == pytest.approx((log_probabilities[0, 2, 8] + log_probabilities[0, 3, 9]).item(), rel=1e-4)


def test_trainer_takes_it_and_checkpoints_hold_the_gates_only(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_steps=2
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())


@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, granularity, reentrant):
    model.set_method(LoraFlow(granularity=granularity))
    set_random_gates(model)
    expected = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_step_gates_under_checkpointing_keep_to_their_own_forward(model, reentrant):
    # Two forwards before one backward: a recomputation that read shared state would see the second one's embeddings.
    model.set_method(LoraFlow(granularity="step"))
    set_random_gates(model)
    first, second = random_ids(seed=1), random_ids(seed=2)
    expected = [_gradients(model, ids) for ids in (first, second)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model.zero_grad()
    (model(first, labels=first).loss + model(second, labels=second).loss).backward()
    for name, parameter in model.gates["model"].named_parameters():
        both = expected[0][f"model.{name}"] + expected[1][f"model.{name}"]
        torch.testing.assert_close(parameter.grad, both, rtol=1e-4, atol=1e-7)


def _gradients(model, ids=None):
    model.zero_grad()
    ids = random_ids() if ids is None else ids
    model(ids, labels=ids).loss.backward()
    return {
        f"{site}.{name}": parameter.grad.clone()
        for site, gate in model.gates.items()
        for name, parameter in gate.named_parameters()
    }


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_compiles_without_a_graph_break(model, granularity):
    model.set_method(LoraFlow(granularity=granularity))
    set_random_gates(model)
    ids = random_ids()
    expected, expected_gradients = model(ids).logits, _gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for site, gate in model.gates.items():
        for name, parameter in gate.named_parameters():
            torch.testing.assert_close(parameter.grad, expected_gradients[f"{site}.{name}"], rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["step", "layer", "module"])
def test_offloaded_layers(adapters, tmp_path, granularity):
    tiny_model().save_pretrained(tmp_path / "base")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    options = BaseOptions(device_map=device_map, model_kwargs={"offload_folder": str(tmp_path / "offload")})
    method = LoraFlow(granularity=granularity)
    offloaded = FusedModel.from_adapters(tmp_path / "base", adapters, method, options=options)
    plain = FusedModel.from_adapters(tmp_path / "base", adapters, method)
    assert offloaded.hf_device_map["model.layers.1"] == "disk"
    set_random_gates(offloaded)
    set_random_gates(plain)
    assert relative_error(offloaded(random_ids()).logits, plain(random_ids()).logits) < 1e-6


@torch.no_grad()
def test_bfloat16_base_with_float32_gates(adapters, monkeypatch):
    exact = FusedModel.from_adapters(tiny_model(dtype=torch.float64), adapters)
    half = FusedModel.from_adapters(tiny_model(dtype=torch.bfloat16), adapters)
    for fused in (exact, half):
        set_random_gates(fused)
    assert {parameter.dtype for gate in half.gates.values() for parameter in gate.parameters()} == {torch.float32}
    truth = exact(random_ids()).logits
    fused_error = relative_error(half(random_ids()).logits, truth)
    use_reference(half, monkeypatch)
    assert fused_error < 1.5 * relative_error(half(random_ids()).logits, truth)


def test_bad_arguments(adapters):
    with pytest.raises(ArchitectureError, match="Linear is not a transformers model"):
        FusedModel.from_adapters(torch.nn.Linear(2, 2), adapters)
    with pytest.raises(MethodError, match=r"Unknown method 'lora-flaw'.*Did you mean 'lora-flow'"):
        FusedModel.from_adapters(tiny_model(), adapters, "lora-flaw")
    with pytest.raises(LoraflowError, match="'average' cannot be used"):
        FusedModel.from_adapters(tiny_model(), {"average": adapters["a"]})
    for name in ("x" * 129, "a\nb", "a\x1b[31mb", "a\u202eb", "\ud800"):
        with pytest.raises(LoraflowError, match=r"characters\) cannot be used: it must have at most 128 characters"):
            FusedModel.from_adapters(tiny_model(), {name: adapters["a"]})
    with pytest.raises(LoraflowError, match="No adapters were given"):
        FusedModel.from_adapters(tiny_model(), {})
    with pytest.raises(LoraflowError, match="`base` is a loaded model"):
        FusedModel.from_adapters(tiny_model(), adapters, options=BaseOptions())
    with pytest.raises(LoraflowError, match=r"`quantization` is unknown: 'bnb-4bits'.*Did you mean 'bnb-4bit'"):
        BaseOptions(quantization="bnb-4bits")
    with pytest.raises(LoraflowError, match="base model '/nowhere/at/all' cannot be read"):
        FusedModel.from_adapters("/nowhere/at/all", adapters)
    fused = FusedModel.from_adapters(tiny_model(), adapters)
    with pytest.raises(ValueError, match="fused already"):
        FusedModel.from_adapters(fused.base_model, adapters)
    with pytest.raises(MethodError, match="unknown adapter 'x'"):
        fused.set_method(Static({"x": 1.0}))


@pytest.mark.parametrize(("kind", "message"), [("t5", "encoder-decoder"), ("bert", "cannot generate|not supported")])
def test_unsupported_architectures_are_named(adapters, kind, message):
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

    sizes = {
        "t5": {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    }
    config = AutoConfig.for_model(kind, vocab_size=16, **sizes[kind])
    model = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModel).from_config(config)
    with pytest.raises(ArchitectureError, match=f"{type(model).__name__}.*({message})"):
        FusedModel.from_adapters(model, adapters)


def test_hidden_states_and_attentions_come_through(model):
    found = model(random_ids(), output_hidden_states=True)
    assert len(found.hidden_states) == 4
    with model.using("base"):
        expected = tiny_model()(random_ids(), output_hidden_states=True)
        found = model(random_ids(), output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))


def test_taking_a_trace_changes_no_mode(tmp_path):
    base = tiny_model("gpt2", resid_pdrop=0.5)
    model = FusedModel.from_adapters(base, {"a": save_adapter(base, tmp_path / "a")}, "a")
    assert not model.training
    expected = model(random_ids()).logits
    model.trace(random_ids())
    assert torch.equal(model(random_ids()).logits, expected)


def test_a_base_is_given_back_when_fusing_fails(adapters):
    base = tiny_model()
    with pytest.raises(LoraflowError, match=r"has no \{prompt\}"):
        FusedModel.from_adapters(base, adapters, tokenizer=number_tokenizer(), prompt=PromptFormat(template="x"))
    with pytest.raises(LoraflowError, match="unknown adapter 'x'"):
        FusedModel.from_adapters(base, adapters, Static({"x": 1.0}))
    model = FusedModel.from_adapters(base, adapters)
    model.unload()
    with pytest.raises(LoraflowError, match="were taken out"):
        model.unload()
    with pytest.raises(LoraflowError, match="were taken out"), model.using("average"):
        pass
    assert torch.equal(base(random_ids()).logits, tiny_model()(random_ids()).logits)


@torch.no_grad()
def test_gates_may_weigh_whole_rows(adapters):
    class ByRow(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.register_buffer("weights", weights)

        def forward(self, x):
            return self.weights

    model = FusedModel.from_adapters(tiny_model(), adapters, "average")
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.0, -1.0]])
    model.attachment.install(Average(), {f"layers.{i}": ByRow(rows) for i in range(3)})
    found = model(random_ids()).logits
    for row, weights in enumerate(rows.tolist()):
        with model.using(Static(dict(zip(adapters, weights, strict=True)))):
            torch.testing.assert_close(found[row], model(random_ids()).logits[row], rtol=1e-4, atol=1e-5)
        model.attachment.install(Average(), {f"layers.{i}": ByRow(rows) for i in range(3)})
    model.attachment.install(Average(), {"layers.0": ByRow(torch.zeros(5, 3))})
    with pytest.raises(MethodError, match=r"weights of shape \(5, 3\) for inputs of \(2, 9\)"):
        model(random_ids())


def test_state_dict_nests(model):
    parent = torch.nn.ModuleDict({"fused": model})
    assert parent.state_dict().keys() == {f"fused.{name}" for name in model.state_dict()}


def test_saving_removes_nobody_elses_files(model, tmp_path):
    mine = tmp_path / "fusion" / "adapters" / "mine" / "precious.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    for copy_adapters in (True, False):
        model.save_pretrained(tmp_path / "fusion", copy_adapters=copy_adapters)
        assert mine.read_text() == "keep"
    assert [path.name for path in mine.parent.parent.iterdir()] == ["mine"]


def test_fitting_leaves_the_base_as_it_was(model):
    model.fit([{"prompt": "5 6", "completion": "6 5"}] * 4, config=FitConfig(epochs=1, gradient_checkpointing=True))
    assert model.config.use_cache
    assert not model.is_gradient_checkpointing
    assert model.training_record["examples"] == 4
    model.set_method("average")
    assert model.training_record is None


def test_encode_is_the_fusions_prompt_padded_on_the_left(adapters):
    prompt = PromptFormat(template="7 {prompt} 8")
    model = FusedModel.from_adapters(tiny_model(), adapters, tokenizer=number_tokenizer(), prompt=prompt)
    inputs = model.encode(["5", [{"role": "user", "content": "5 6 9"}]])
    assert inputs["input_ids"].tolist() == [[0, 0, 7, 5, 8], [7, 5, 6, 9, 8]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert model.encode("5")["input_ids"].tolist() == [[7, 5, 8]]
    with pytest.raises(DataError, match="Read them with `loraflow"):
        model.fit("train.jsonl")


def test_of_several_processes_the_main_one_saves(model, tmp_path):
    model.save_pretrained(tmp_path / "other", state_dict=None, is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "main", state_dict=None, is_main_process=True)
    assert (tmp_path / "main" / "fusion.safetensors").is_file()
