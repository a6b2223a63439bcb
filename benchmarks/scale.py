"""What a fusion takes of memory at the sizes that people have: the table of docs/scale.md.

    python benchmarks/scale.py            # a minute, 4 GiB; needs no GPU and no network

Weights and adapters are counted on models without weights. What a fit keeps for the backward is measured: on one
decoder layer of the true width, with the fusion in it, as the bytes that autograd keeps of it for each token.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
import transformers
from gpu import SHAPES, make_adapters
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from loraflow import FusedModel, LoraFlow

BASES: dict[str, PreTrainedConfig] = {
    "7B (Llama-2-7B)": SHAPES["llama-2-7b"],
    "13B (Llama-2-13B)": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "70B (Llama-3-70B)": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "30B-A3B (Qwen3, 128 experts)": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
# NF4: half a byte a value, and for each 64 of them a scale, which is itself quantised: 8 bits, and 32 for 256 of those.
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
GIB, MIB = 2**30, 2**20


def main() -> None:
    """Print the table."""
    args = parse_arguments()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; k = {args.adapters}, r = {args.rank}, "
        f"{args.tokens:,} tokens a step\n"
    )
    print("| base | bf16 | 4-bit | adapters | gates, with AdamW | kept by a step | with checkpointing | logits |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in BASES.items():
        print(f"| {name} | {' | '.join(row(config, args))} |")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2, help="k")
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step: rows times their length")
    return parser.parse_args()


def row(config: PreTrainedConfig, args: argparse.Namespace) -> list[str]:
    """One base's cells."""
    base = without_weights(config, config.num_hidden_layers)
    values = sum(parameter.numel() for parameter in base.parameters())
    linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    # bitsandbytes quantises linears; transformers keeps experts as one parameter, which stays as it is.
    quantised = sum(linear.weight.numel() for linear in linears.values())
    lora = args.adapters * args.rank * sum(sum(linear.weight.shape) for linear in linears.values())
    gates = config.num_hidden_layers * args.adapters * (config.hidden_size + 1)
    layer = kept_of_a_layer(config, args)
    logits = config.vocab_size * args.tokens
    return [
        f"{2 * values / GIB:.1f} GiB",
        f"{(2 * (values - quantised) + NF4_BYTES * quantised) / GIB:.1f} GiB",
        f"{2 * lora / MIB:.0f} MiB",
        # Value, gradient and two moments, of 4 bytes each.
        f"{16 * gates / MIB:.1f} MiB",
        f"{layer * config.num_hidden_layers * args.tokens / GIB:.1f} GiB",
        # A layer keeps its input, and one layer at a time all the rest.
        f"{(2 * config.hidden_size * config.num_hidden_layers + layer) * args.tokens / GIB:.1f} GiB",
        # As the model gives them, and in float32 for the loss, with the gradient of both.
        f"{2 * (2 + 4) * logits / GIB:.1f} GiB",
    ]


def without_weights(config: PreTrainedConfig, layers: int) -> PreTrainedModel:
    """A base on the meta device."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def kept_of_a_layer(config: PreTrainedConfig, args: argparse.Namespace) -> float:
    """Bytes that autograd keeps of a decoder layer for each token: two layers' less one layer's."""
    tokens = 32
    small = copy.deepcopy(config)
    small.vocab_size = 64
    one, two = (kept(small, layers, tokens, args) for layers in (1, 2))
    return (two - one) / tokens


def kept(config: PreTrainedConfig, layers: int, tokens: int, args: argparse.Namespace) -> int:
    """Bytes of distinct tensors that the forward of a fit keeps, parameters and buffers not counted."""
    base = without_weights(config, layers).to_empty(device="cpu").requires_grad_(False)
    # The fusion finds out what each linear reads: values must differ. One block again and again is made fast.
    block = torch.randn(2**20 + 1).bfloat16() / 32
    for tensor in (*base.parameters(), *base.buffers()):
        for piece in tensor.data.view(-1).split(len(block)):
            piece.copy_(block[: len(piece)])
    model = FusedModel.from_adapters(base, make_adapters(base, args.adapters, args.rank), LoraFlow(start="average"))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *base.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, config.vocab_size, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    model.unload()
    return sum(found.values())


if __name__ == "__main__":
    main()
