"""The load format `loraflow`: the base as another loader loads it, then a fusion put into it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from loraflow.errors import FusionError, LoraflowError
from loraflow.serving.vllm.options import FusionOptions
from loraflow.serving.vllm.seam import (
    BaseModelLoader,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    engine_settings,
    get_model_loader,
    init_logger,
)

if TYPE_CHECKING:
    from loraflow.serving.vllm.plan import FusionPlan

logger = init_logger("vllm.loraflow")

SETTINGS = "loraflow"


class FusionLoader(BaseModelLoader):
    """Loads a base with another loader, and puts a saved fusion into it."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options, rest = FusionOptions.parse(load_config.model_loader_extra_config)
        inner = dataclasses.replace(load_config, load_format=self.options.load_format, model_loader_extra_config=rest)
        self.inner = get_model_loader(inner)

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the base."""
        self.inner.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the base's weights once more; what was fused stays."""
        self.inner.load_weights(model, model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, **kwargs: Any) -> nn.Module:
        """Load the base and put the fusion into it."""
        # Late: reading a fusion needs transformers and PEFT, and vLLM imports its loaders in every process.
        from loraflow.serving.vllm.checks import check_engine, check_plan
        from loraflow.serving.vllm.fuse import fuse
        from loraflow.serving.vllm.request_table import RequestTable
        from loraflow.serving.vllm.requests import install_table, requested_fusion

        options = self.options
        requested = requested_fusion(model_config.logits_processors)
        rules = {"requests": requested is not None, "unverified": options.unverified}
        check_engine(engine_settings(vllm_config), **rules)
        plan = _read(options, requested, model_config)
        check_plan(plan, **rules)
        settings = {"digest": plan.digest, "requests": requested is not None}
        _put_in_key(vllm_config, settings)
        model = self.inner.load_model(vllm_config=vllm_config, model_config=model_config, **kwargs)
        _check_key(model, settings)
        table = None
        if requested is not None:
            limits = vllm_config.scheduler_config
            layers = len(plan.layers)
            table = RequestTable(limits.max_num_seqs, limits.max_num_batched_tokens, layers, plan.adapters)
            install_table(model, table.to(vllm_config.device_config.device), vllm_config)
        fuse(model, plan, model_config.dtype, vllm_config.device_config.device, table)
        logger.info("Fused %s by %r into %s.", ", ".join(plan.adapters), plan.method.name, type(model).__name__)
        return model


def _read(options: FusionOptions, requested: str | None, model_config: Any) -> FusionPlan:
    from loraflow.bases import BaseOptions
    from loraflow.serving.vllm.plan import check_digest, read_plan

    if requested not in (None, options.fusion):
        raise LoraflowError(
            f"Requests bring weights for the fusion {requested!r}, and {options.fusion!r} is served. Name one fusion "
            "in --logits-processors and --model-loader-extra-config."
        )
    base = BaseOptions(revision=model_config.revision, trust_remote_code=model_config.trust_remote_code)
    plan = read_plan(options.fusion, model_config.model, base, options.adapters)
    check_digest(plan, options.digest)
    recorded = plan.config.base
    if recorded.quantization is not None and not options.unverified:
        raise FusionError(
            f"The fusion was made with a base quantised by bitsandbytes ({recorded.quantization}), which vLLM computes "
            'otherwise. Fit it with the base as it is, or give `"unverified": true` in --model-loader-extra-config.'
        )
    if recorded.dtype != str(model_config.dtype).removeprefix("torch."):
        logger.info("The fusion was made in %s and is served in %s.", recorded.dtype, model_config.dtype)
    if model_config.quantization is not None:
        logger.info(
            "The fusion was made on a base as it is, and is served on one quantised by %s.", model_config.quantization
        )
    return plan


def _put_in_key(vllm_config: Any, settings: dict[str, Any]) -> None:
    """Make the fusion part of the key of vLLM's compile cache, which knows nothing of load formats.

    Without it vLLM would find what it compiled for the base, or for the fusion as it was, and answer as that.

    Raises:
        FusionError: if the settings there are another fusion's.
        LoraflowError: if they cannot be added to.
    """
    present = vllm_config.additional_config
    if not isinstance(present, dict):
        raise LoraflowError(
            f"`additional_config` is a {type(present).__name__}, to which the fusion cannot be added. Give a dict."
        )
    if present.get(SETTINGS, settings) != settings:
        raise FusionError(
            f"--additional-config says {present[SETTINGS]!r} of the fusion, and the files say {settings!r}. Leave it "
            "out of --additional-config: it is added when the fusion is read."
        )
    vllm_config.additional_config = {**present, SETTINGS: settings}


def _check_key(model: nn.Module, settings: dict[str, Any]) -> None:
    """Check that whatever vLLM compiles of a model is kept under a key with the fusion in it.

    Raises:
        LoraflowError: if something is not.
    """
    for name, module in model.named_modules():
        config = getattr(module, "vllm_config", None)
        if config is not None and config.additional_config.get(SETTINGS) != settings:
            raise LoraflowError(
                f"What vLLM compiles of '{name}' would not be kept apart from the base's. Add --enforce-eager, and "
                "report this base to loraflow."
            )
