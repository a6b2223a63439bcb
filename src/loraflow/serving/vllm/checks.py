"""What is refused, with its reason, before anything is served: whatever is not known to give what `generate` gives."""

from __future__ import annotations

from collections.abc import Iterator

from loraflow.errors import ArchitectureError, LoraflowError, MethodError
from loraflow.methods import METHODS
from loraflow.serving.vllm.plan import FusionPlan, check_update
from loraflow.serving.vllm.request_weights import SCHEDULER
from loraflow.serving.vllm.settings import EngineSettings

# Their decoder layers are handed `hidden_states` and `residual`, whose sum is what transformers' layer is handed; of
# others the sum may be something else. Each of these has been compared with `FusedModel.generate`.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
_UNVERIFIED = 'To serve it all the same, compare answers and give `"unverified": true` in --model-loader-extra-config.'


def check_plan(plan: FusionPlan, *, requests: bool, unverified: bool = False) -> None:
    """Check that a fusion is of a kind that is served exactly.

    Raises:
        MethodError: if its method cannot be served, or not so.
    """
    method = plan.method
    if method.level == "query" and not requests:
        raise MethodError(
            f"The method {method.name!r} weighs whole prompts, which vLLM does not show to a plug-in. Let each request "
            "bring its weights (see docs/vllm.md), or serve it with `loraflow serve`."
        )
    if method.reads_prompt and method.level != "query":
        raise MethodError(
            f"The method {method.name!r} weighs tokens by what the whole prompt says, which vLLM does not show to a "
            "plug-in. Serve it with `loraflow serve`."
        )
    if method.adds and requests:
        raise MethodError(
            f"The method {method.name!r} adds updates of its own beside the weighted adapters, and vLLM computes all "
            "of it as one adapter, so requests cannot bring weights for its parts. Serve it without weights of "
            "requests, or with `loraflow serve`."
        )
    if method.mixing == "parameters":
        other = 'mode="mixture"' if method.level == "query" else 'mixes="outputs"'
        raise MethodError(
            f"The method {method.name!r} mixes parameters, whose cross terms are not computed in vLLM. Serve it with "
            f"`loraflow serve`, export it as one adapter, or fit it with `{other}`."
        )
    if not plan.gates and not requests:
        raise MethodError(f"The method {method.name!r} is the base alone. Serve the base without a fusion.")
    if method.level == "token" and method.name not in METHODS and not unverified:
        raise MethodError(
            f"The method {method.name!r} is another package's, and vLLM lays the tokens of all requests in one row: "
            f"its gate must look at one token at a time. {_UNVERIFIED}"
        )
    for layer in plan.layers:
        for updates in layer.values():
            for name, update in zip(plan.adapters, updates, strict=True):
                if update is not None:
                    check_update(name, update)


def check_engine(engine: EngineSettings, *, requests: bool, unverified: bool = False) -> None:
    """Check that vLLM is set up so that a fusion is served exactly.

    Raises:
        ArchitectureError: if the base is of a kind that has not been compared.
        LoraflowError: if a setting keeps a fusion from being served.
    """
    for setting, reason in _conflicts(engine, requests):
        raise LoraflowError(f"A fusion cannot be served with {setting}: {reason}")
    architecture = engine.architecture
    if architecture not in ARCHITECTURES and not unverified:
        raise ArchitectureError(
            f"vLLM's {architecture} has not been compared with transformers; {', '.join(ARCHITECTURES)} have. "
            f"{_UNVERIFIED}"
        )
    if requests and engine.v2_runner and not unverified:
        raise LoraflowError(
            "Weights of requests have not been compared on vLLM's V2 model runner, which runs on GPUs only. Set "
            f"VLLM_USE_V2_MODEL_RUNNER=0, or compare. {_UNVERIFIED}"
        )


def _conflicts(engine: EngineSettings, requests: bool) -> Iterator[tuple[str, str]]:
    if engine.runner != "generate":
        yield f"--runner {engine.runner}", "only text generation can be. Leave the option out."
    if engine.latent_attention:
        yield "multi-head latent attention", "it multiplies weights together, past their linears. Take another base."
    if engine.sleep_mode:
        yield "--enable-sleep-mode", "waking up may bring back the base alone. Leave the option out."
    if engine.pipeline_parallel > 1:
        yield "--pipeline-parallel-size", "weights of one gate do not reach other stages. Use --tensor-parallel-size."
    if engine.data_parallel > 1:
        yield "--data-parallel-size", "engines in step with each other have not been tried. Start several servers."
    if engine.context_parallel > 1:
        yield "context parallelism", "it has not been tried. Use --tensor-parallel-size."
    if engine.expert_parallel:
        yield "--enable-expert-parallel", "it has not been tried. Leave the option out."
    if engine.micro_batches:
        yield "--enable-dbo", "two halves of a batch would overwrite each other's weights. Leave the option out."
    if engine.speculative:
        yield "--speculative-config", "it has not been tried. Leave the option out."
    if engine.kv_transfer:
        yield "--kv-transfer-config", "caches outside the engine know a base by name, not its fusion. Leave it out."
    if engine.cache_dir:
        yield "a compilation `cache_dir`", "what is in it may be of another fusion. Set VLLM_CACHE_ROOT instead."
    if requests and engine.prefix_caching and not engine.salted:
        yield (
            "prefix caching while requests bring weights of their own",
            f"one request's cache would be read with another's weights. Add --scheduler-cls {SCHEDULER}, which keeps "
            "them apart, or --no-enable-prefix-caching.",
        )
