"""Tiny models of real architectures, and real PEFT adapters for them, made in memory."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from loraflow import FusedModel
from loraflow.adapters import Adapter, AdapterSource, LoraModule
from loraflow.core.linear import FusedLinear
from loraflow.core.reference import merged_weight, reference_gate, reference_linear
from loraflow.methods.flow_gates import FlowGate

VOCAB = 64
ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_GPT2 = {
    **_COMMON,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = {
    **_COMMON,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}
_QWEN2_MOE = {
    **_LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
# The up projection of its latent attention reads all cached positions; its first layer is dense.
_DEEPSEEK = {
    **{name: value for name, value in _LLAMA.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}

ARCHITECTURES: dict[str, tuple[dict, list[str]]] = {
    "llama": (_LLAMA, ALL_LLAMA),
    "mistral": ({**_LLAMA, "sliding_window": 6}, ALL_LLAMA),
    "qwen2": (_LLAMA, ALL_LLAMA),
    "qwen3": (_LLAMA, ALL_LLAMA),
    "gemma2": ({**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 6}, ALL_LLAMA),
    "gemma3_text": ({**_LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 6}, ALL_LLAMA),
    "phi3": (_LLAMA, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": (_GPT2, ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": (_NEOX, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "opt": (_OPT, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "falcon": (
        {**_COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 48},
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "mixtral": ({**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen2_moe": (
        _QWEN2_MOE,
        ["q_proj", "v_proj", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
    ),
    "deepseek_v3": (_DEEPSEEK, ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    "gpt_oss": (
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "rope_scaling": None},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "doge": (_LLAMA, ["q_proj", "v_proj", "dt_proj", "o_proj", "up_proj"]),
}


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model of an architecture, small enough for milliseconds; `changes` are to its configuration."""
    torch.manual_seed(seed)
    settings = ARCHITECTURES.get(architecture, (_LLAMA, ALL_LLAMA))[0]
    config = AutoConfig.for_model(architecture, **{**settings, **changes})
    # The grouped kernels of the experts know no float64.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Default initialisation is nearly zero at this size: logits that hardly differ would hide errors.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def save_adapter(
    base: PreTrainedModel, directory: Path, targets: Sequence[str] | str | None = None, seed: int = 1, **config: object
) -> str:
    """Train nothing, but save a PEFT adapter with random weights, as PEFT writes it; returns its path."""
    torch.manual_seed(seed)
    targets = targets if targets is not None else ARCHITECTURES.get(base.config.model_type, (_LLAMA, ALL_LLAMA))[1]
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=targets, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name or name.endswith("lora_B.default.bias"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(directory)
    return str(directory)


def random_adapter(
    base: PreTrainedModel,
    name: str,
    targets: Sequence[str] | None = None,
    r: int = 4,
    kind: str = "plain",
    seed: int = 1,
    layers: Sequence[int] | None = None,
) -> Adapter:
    """An adapter in memory, "plain", "dora", "lora_bias" or "rslora", with random weights; in all layers or some."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    modules = {}
    for module_name, linear in base.named_modules():
        layer = re.search(r"\.(\d+)\.", module_name)
        wanted = targets or ARCHITECTURES[base.config.model_type][1]
        if layer is None or not any(module_name.endswith(f".{target}") for target in wanted):
            continue
        if layers is not None and int(layer[1]) not in layers:
            continue
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        out_features, in_features = weight.shape
        modules[module_name] = LoraModule(
            lora_A=random(r, in_features) / in_features**0.5,
            lora_B=random(out_features, r) / r**0.5,
            scaling=2 / r**0.5 if kind == "rslora" else 2 / r,
            bias=random(out_features) if kind == "lora_bias" else None,
            magnitude=weight.float().norm(dim=1) * (1 + 0.2 * random(out_features)) if kind == "dora" else None,
        )
    config = LoraConfig(r=r, target_modules=list(modules))
    return Adapter(name, AdapterSource(name), config, modules, f"digest of {name}")


def merged_model(
    base: PreTrainedModel, adapters: Sequence[Adapter], weights: Sequence[Sequence[float]] | Sequence[float]
) -> PreTrainedModel:
    """A copy of a base with adapters merged into it by constant weights, for all layers or a row for each."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name in {module for adapter in adapters for module in adapter.modules}:
            updates = [adapter.modules.get(name) for adapter in adapters]
            by_layer = [list(row) for row in weights] if isinstance(weights[0], Sequence) else None
            chosen = by_layer[int(re.search(r"\.(\d+)\.", name)[1])] if by_layer else list(weights)
            linear = merged.get_submodule(name)
            transposed = isinstance(linear, Conv1D)
            new = merged_weight(linear.weight.T if transposed else linear.weight, updates, chosen)
            linear.weight.copy_(new.T if transposed else new)
            for update, weight in zip(updates, chosen, strict=True):
                if update is not None and update.bias is not None:
                    if linear.bias is None:
                        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
                    linear.bias += weight * update.scaling * update.bias.to(linear.bias.dtype)
    return merged


def block_outputs(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """What each decoder layer gives, `[layers, batch, seq, hidden]`, without the final norm."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def edit_config(directory: str | Path, **changes: object) -> None:
    """Change a saved adapter's settings; `...` removes one."""
    path = Path(directory) / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(
    directory: str | Path,
    edit: Callable[[dict[str, torch.Tensor]], object],
    file: str = "adapter_model.safetensors",
) -> None:
    """Change a saved adapter's tensors in place, or those of another file."""
    path = Path(directory) / file
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def peft_model(base: PreTrainedModel, directory: str, *, copied: bool = True) -> nn.Module:
    """What PEFT makes of a saved adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base) if copied else base, directory).eval()


def random_ids(batch: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def exact_loss(model: nn.Module, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """The language-modelling loss in the precision of the logits; transformers' own is float32."""
    logits = model(input_ids, **kwargs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def use_reference(model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fused model compute by the slow reference and plain autograd, keeping its gates' parameters."""
    prefix = model.attachment.layers.prefix

    def linear_forward(self: FusedLinear, x: torch.Tensor) -> torch.Tensor:
        layer = self.fused.context
        group = self.fused.group
        weights = layer.weights_for(group.names, group.rows, x).to(x.dtype)
        if weights.shape[-1] != len(model.adapters):
            weights = weights.split(len(model.adapters), dim=-1)[self.fused.member]
        weights = weights.view(*x.shape[:-1], -1)
        modules = [adapter.modules.get(f"{prefix}.{layer.index}.{self.fused.name}") for adapter in model.adapters]
        weight = self.weight.T if isinstance(self, Conv1D) else self.weight
        return reference_linear(x, weight, self.bias, modules, weights)

    def gate_forward(self: FlowGate, x: torch.Tensor) -> torch.Tensor:
        return reference_gate(x, self.weight, self.bias, self.shape.temperature)

    monkeypatch.setattr(FusedLinear, "forward", linear_forward)
    monkeypatch.setattr(FlowGate, "forward", gate_forward)


def set_random_gates(model: FusedModel, seed: int = 5) -> None:
    """Give a fused model's gates random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in model.gates.values():
            for value in gate.state_dict().values():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers from 3 on, each its own id."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(number): number for number in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes, which reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TURNS = {"<|im_end|>": CHATML, "<end_of_turn>": GEMMA}
"""Chat templates as ChatML's and Gemma's, by the token that ends their turns."""


def chat_tokenizer(
    end: str = "<|im_end|>", template: str | None = "", *, special: bool = True
) -> PreTrainedTokenizerFast:
    """The byte tokenizer with the tokens of a chat template, whose end of a turn is another than the end of texts.

    By default with the template too; None leaves it out. Tokens that are not special are shown in texts.
    """
    tokenizer = byte_tokenizer()
    tokens = [end, end.replace("end", "start")]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    else:
        tokenizer.add_tokens(tokens)
    tokenizer.chat_template = TURNS[end] if template == "" else template
    return tokenizer


def writing_model(tokenizer: PreTrainedTokenizerFast, text: str, first: str = "\n") -> PreTrainedModel:
    """A model that writes a text after its first token, and the last of its tokens for ever.

    No token may come twice in the text, but the last. It ends at the end of texts, id 2, which it never writes.
    """
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    ids = tokenizer(first + text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids), "each token must say which one is next"
    with torch.no_grad():
        for layer in model.model.layers:
            # What a token says depends on nothing before it.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.model.embed_tokens.weight
        embeddings /= embeddings.norm(dim=1, keepdim=True)
        model.lm_head.weight.zero_()
        for token, following in zip(ids, [*ids[1:], ids[-1]], strict=True):
            model.lm_head.weight[following] += embeddings[token]
    return model


def trained_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
