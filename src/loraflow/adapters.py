"""LoRA adapters as PEFT writes them, read without PEFT's model surgery and checked before anything is fused.

An adapter is `adapter_config.json` and `adapter_model.safetensors`, in a directory or on the Hub. What is read here
gives exactly what PEFT gives when it loads the same files; what cannot is refused with the file, the key and the
remedy.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraflow.errors import AdapterError, did_you_mean

if TYPE_CHECKING:  # PEFT is imported where it is used: it imports bitsandbytes, which takes a second and may print.
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_KEY_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?)$"
)

# Settings that decide the mathematics: they are part of the digest, so that a changed alpha is a changed adapter.
_MATHS = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")
# Settings that choose modules, describe the training, or only matter while training.
_HARMLESS = frozenset(
    {
        *_MATHS,
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        # Converting to plain LoRA, PEFT leaves these of CorDA, LoftQ and LoRA-GA; see `init_lora_weights`.
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_REMEDY_PLAIN = "Retrain it as plain LoRA, rsLoRA or DoRA."
_REMEDY_CONVERT = (
    "Convert it to plain LoRA with PEFT: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
)
_REFUSED = {
    "alora_invocation_tokens": f"an aLoRA acts only after its invocation tokens. {_REMEDY_PLAIN}",
    "arrow_config": "it is a PEFT Arrow router, not an adapter. Give the adapters that it routes to.",
    "kasa_config": f"KaSA changed the base weights while training. {_REMEDY_PLAIN}",
    "layer_replication": f"it repeats decoder layers, so its layers are not the base's. {_REMEDY_PLAIN}",
    "megatron_config": f"Megatron's parallel layers are not supported. {_REMEDY_PLAIN}",
    "modules_to_save": "it replaces whole modules of the base. Retrain without `modules_to_save`.",
    "monteclora_config": f"MonteCLoRA samples its weights. {_REMEDY_PLAIN}",
    "target_parameters": "it adapts bare parameters, not linear modules. Retrain with `target_modules`.",
    "trainable_token_indices": "it replaces token embeddings. Retrain without `trainable_token_indices`.",
    "use_bdlora": f"BD-LoRA's block-diagonal factors are not supported. {_REMEDY_PLAIN}",
    "use_qalora": f"QALoRA pools its input by groups. {_REMEDY_PLAIN}",
    "velora_config": f"VeLoRA is not supported. {_REMEDY_PLAIN}",
}
# Initialisations that move part of W into B A, so that PEFT's W is no longer the base's.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraModule:
    """One adapter's update of one linear module: `scaling * (lora_B (lora_A x) + bias)`, with DoRA's magnitude.

    Attributes:
        lora_A: down projection, `[rank, in_features]`.
        lora_B: up projection, `[out_features, rank]`, scaling not applied.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: the bias of `lora_B` (`lora_bias=True`), `[out_features]`.
        magnitude: DoRA's magnitude vector, `[out_features]`.
    """

    lora_A: Float[Tensor, "rank in_features"]
    lora_B: Float[Tensor, "out_features rank"]
    scaling: float
    bias: Float[Tensor, " out_features"] | None = None
    magnitude: Float[Tensor, " out_features"] | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter lives: a local directory, or a Hub repository with an optional subfolder and revision."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str | Path | AdapterSource) -> AdapterSource:
        """Read `directory`, `user/repo`, `user/repo/subfolder`; a Hub id may end in `@revision`."""
        if isinstance(source, AdapterSource):
            return source
        text = str(source)
        if not Path(text).expanduser().exists() and "@" in text:
            path, _, revision = text.rpartition("@")
            return cls(path, revision)
        return cls(text)

    @property
    def is_local(self) -> bool:
        """Whether the path names something on this machine's disk rather than on the Hub."""
        path = Path(self.path).expanduser()
        return path.exists() or path.is_absolute() or self.path.startswith((".", "~")) or len(path.parts) == 1


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter in memory, by module name of the base model.

    Attributes:
        name: the name it has in the fusion.
        source: where it was read from; on the Hub with the resolved commit as revision.
        config: PEFT's configuration of it.
        modules: its updates, keyed by the base's module name (`model.layers.0.self_attn.q_proj`).
        digest: SHA-256 of its weights and of the settings that decide the mathematics.
    """

    name: str
    source: AdapterSource
    config: LoraConfig
    modules: Mapping[str, LoraModule] = field(repr=False)
    digest: str

    @property
    def parameters(self) -> int:
        """Number of values in the adapter's tensors."""
        return sum(
            tensor.numel()
            for module in self.modules.values()
            for tensor in (module.lora_A, module.lora_B, module.bias, module.magnitude)
            if tensor is not None
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def uses_dora(self) -> bool:
        """Whether any of its modules carries a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())


def load_adapter(name: str, source: str | Path | AdapterSource) -> Adapter:
    """Read one adapter from PEFT's files, and refuse what could not be fused exactly on any base.

    Args:
        name: the name it gets in the fusion.
        source: a directory, `user/repo`, `user/repo/subfolder`, each Hub id optionally `@revision`.

    Returns:
        The adapter, its tensors on the CPU in the precision of the file.

    Raises:
        AdapterError: if files are missing, are pickles, or hold what cannot be fused exactly.
    """
    from peft import LoraConfig

    place = AdapterSource.parse(source)
    config_path, weights_path, resolved = (_locate_local if place.is_local else _locate_on_hub)(name, place)
    raw_config = _read_config(name, config_path)
    _refuse_unfusable(name, config_path, raw_config)
    known = {f.name for f in fields(LoraConfig)}
    try:
        config = LoraConfig(**{key: value for key, value in raw_config.items() if key in known})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"Adapter {name!r}: PEFT cannot read {config_path}: {error}") from error
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError, RuntimeError) as error:
        # It opens the file twice, the second time through torch, which raises a RuntimeError where it is gone by then.
        raise AdapterError(
            f"Adapter {name!r}: {weights_path} is not a readable safetensors file ({error}). Download or save it again."
        ) from error
    modules = _modules(name, weights_path, config, tensors)
    maths = json.dumps({key: getattr(config, key) for key in _MATHS}, sort_keys=True)
    return Adapter(name, resolved, config, modules, tensors_digest(tensors, maths))


def match_adapter(adapter: Adapter, base: nn.Module) -> None:
    """Check that every tensor of an adapter has its place in a base model, and that none is missing.

    The base may be on the meta device.

    Raises:
        AdapterError: if a key matches nothing, a shape differs, or the file lacks a module that its own configuration
            targets.
    """
    from peft.tuners import tuners_utils

    linears = dict(_linears(base))
    for module_name, module in adapter.modules.items():
        if module_name not in linears:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): key '{_KEY_PREFIX}{module_name}.lora_A.weight' "
                f"matches no linear module of {type(base).__name__}.{_nearest(module_name, linears)} "
                "Is it an adapter of another base model?"
            )
        _check_vectors(adapter, module_name, module)
        expected = linears[module_name]
        found = (module.lora_A.shape[1], module.lora_B.shape[0])
        if found != expected:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): '{module_name}' maps {found[0]} to {found[1]} "
                f"features, but the base's maps {expected[0]} to {expected[1]}. It was trained on another base "
                f"({adapter.config.base_model_name_or_path!r}): give that base, or another adapter."
            )
    # PEFT resolves "all-linear" in place; this adapter's own configuration is for any base.
    config = tuners_utils._maybe_include_all_linear_layers(copy.copy(adapter.config), base)
    missing = [n for n in linears if n not in adapter.modules and tuners_utils.check_target_module_exists(config, n)]
    if missing:
        raise AdapterError(
            f"Adapter {adapter.name!r} ({adapter.source.path}): `target_modules` of {CONFIG_FILE} includes "
            f"'{missing[0]}' ({len(missing)} such), but {WEIGHTS_FILE} has no weights for it. Save the adapter again."
        )


def _check_vectors(adapter: Adapter, module_name: str, module: LoraModule) -> None:
    out_features = module.lora_B.shape[0]
    for part, vector in (("lora_B.bias", module.bias), ("lora_magnitude_vector", module.magnitude)):
        if vector is not None and vector.numel() != out_features:
            raise AdapterError(
                f"Adapter {adapter.name!r} ({adapter.source.path}): '{module_name}.{part}' has {vector.numel()} values "
                f"for {out_features} output features. Save the adapter again."
            )


def _nearest(module_name: str, linears: Mapping[str, Any]) -> str:
    guess = did_you_mean(module_name, linears).partition("Did you mean ")[2]
    return f" The nearest is {guess.rstrip('?')}." if guess else ""


def _linears(base: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear module of a model, quantised ones included, with (in_features, out_features)."""
    from peft.tuners.tuners_utils import _get_in_out_features

    for name, module in base.named_modules():
        # PEFT's function warns about every module that is no linear; quantised linears have these attributes too.
        if isinstance(module, Conv1D) or hasattr(module, "in_features") or hasattr(module, "infeatures"):
            in_features, out_features = _get_in_out_features(module)
            if in_features is not None and out_features is not None:
                yield name, (in_features, out_features)


def _locate_local(name: str, source: AdapterSource) -> tuple[Path, Path, AdapterSource]:
    directory = Path(source.path).expanduser()
    if not directory.is_dir():
        raise AdapterError(
            f"Adapter {name!r}: {source.path!r} is not a directory. Give a directory with {CONFIG_FILE} in it, "
            "or a Hub id such as 'user/repo'."
        )
    if source.revision is not None:
        raise AdapterError(
            f"Adapter {name!r}: a revision ({source.revision!r}) needs a Hub id, not the directory {source.path!r}."
        )
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if not config_path.is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f" Its subfolders {inside} have one: give one of those." if inside else ""
        raise AdapterError(f"Adapter {name!r}: {directory} has no {CONFIG_FILE}.{hint or ' Is it a PEFT adapter?'}")
    if not weights_path.is_file():
        raise AdapterError(_no_weights(name, str(directory), pickled=(directory / PICKLE_FILE).is_file()))
    # Absolute from here on: a later change of the working directory must not change what the path means.
    return config_path, weights_path, AdapterSource(str(directory.resolve()))


def _locate_on_hub(name: str, source: AdapterSource) -> tuple[Path, Path, AdapterSource]:
    user, repo, *folders = source.path.strip("/").split("/")
    repo_id, subfolder = f"{user}/{repo}", "/".join(folders) or None
    where = f"{source.path!r} on the Hugging Face Hub"
    wanted, commit = CONFIG_FILE, source.revision
    try:
        config_path = Path(hf_hub_download(repo_id, CONFIG_FILE, subfolder=subfolder, revision=commit))
        # Files are laid out as .../snapshots/<commit>/...: the commit makes the source exact, and the weights its own.
        parts = config_path.parts
        commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else commit
        wanted = WEIGHTS_FILE
        weights_path = Path(hf_hub_download(repo_id, WEIGHTS_FILE, subfolder=subfolder, revision=commit))
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            f"Adapter {name!r}: {where} cannot be reached and is not in the local cache. "
            "Check the network, or give a directory."
        ) from error
    except EntryNotFoundError as error:
        if wanted == WEIGHTS_FILE:
            raise AdapterError(_no_weights(name, where, pickled=True)) from error
        raise AdapterError(
            f"Adapter {name!r}: {where} has no {CONFIG_FILE}. Is it a PEFT adapter, or in a subfolder?"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"Adapter {name!r}: {where} cannot be read: {error}") from error
    return config_path, weights_path, AdapterSource(source.path, commit)


def _no_weights(name: str, where: str, *, pickled: bool) -> str:
    if pickled:
        return (
            f"Adapter {name!r}: {where} has no {WEIGHTS_FILE}; pickled weights ({PICKLE_FILE}) can run code and are "
            "not read. Load it with PEFT and save it again with `save_pretrained` (safetensors is its default)."
        )
    return f"Adapter {name!r}: {where} has no {WEIGHTS_FILE}. Save the adapter again."


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"Adapter {name!r}: {path} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"Adapter {name!r}: {path} holds a {type(config).__name__}, not an object. Save the adapter again."
        )
    return config


def _refuse_unfusable(name: str, path: Path, config: Mapping[str, Any]) -> None:
    def refuse(key: str, why: str) -> AdapterError:
        return AdapterError(f"Adapter {name!r} cannot be fused: {path} has `{key}` = {config.get(key)!r}: {why}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only 'LORA' adapters can be fused. Give a LoRA adapter.")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "it replaces biases of the base. Retrain with `bias='none'`.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise refuse("init_lora_weights", f"this initialisation changed the base weights. {_REMEDY_CONVERT}")
    for key, value in config.items():
        if not value or key in _HARMLESS:
            continue
        raise refuse(key, _REFUSED.get(key, "this setting is unknown to this version of loraflow. Update loraflow."))


def _modules(name: str, path: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoraModule]:
    parts = _by_module(name, path, tensors)
    modules = {module: _module(name, path, config, module, found) for module, found in parts.items()}
    if not modules:
        raise AdapterError(f"Adapter {name!r}: {path} holds no LoRA weights. Save the adapter again.")
    if all(not m.lora_B.any() and m.bias is None and m.magnitude is None for m in modules.values()):
        raise AdapterError(
            f"Adapter {name!r} changes nothing: every `lora_B.weight` in {path} is zero, as before any training. "
            "Train it, or leave it out."
        )
    return modules


def _by_module(name: str, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key.removeprefix(_KEY_PREFIX))
        if match is None:
            raise AdapterError(
                f"Adapter {name!r}: key '{key}' in {path} is not a LoRA weight of a linear module (embedding LoRA and "
                "saved base weights cannot be fused). Retrain it on linear modules only."
            )
        parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
    return parts


def _module(name: str, path: Path, config: LoraConfig, module: str, found: Mapping[str, Tensor]) -> LoraModule:
    needed = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if config.use_dora else [])]
    needed += ["lora_B.bias"] if config.lora_bias else []
    for part in needed:
        if part not in found:
            raise AdapterError(
                f"Adapter {name!r}: {path} lacks '{_KEY_PREFIX}{module}.{part}'. Save the adapter again."
            )
    for part in found:
        if part not in needed:
            raise AdapterError(
                f"Adapter {name!r}: '{_KEY_PREFIX}{module}.{part}' in {path} is not what {CONFIG_FILE} describes "
                f"(use_dora={config.use_dora}, lora_bias={config.lora_bias}). Save the adapter again."
            )
    lora_A, lora_B = found["lora_A"], found["lora_B"]
    rank = _by_pattern(config.rank_pattern, module, config.r)
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise AdapterError(
            f"Adapter {name!r}: '{module}' has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} in "
            f"{path}, but {CONFIG_FILE} says rank {rank}. Save the adapter again."
        )
    for part, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"Adapter {name!r}: '{module}.{part}' in {path} holds NaN or infinite values. Train it again."
            )
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return LoraModule(lora_A, lora_B, scaling, found.get("lora_B.bias"), found.get("lora_magnitude_vector"))


def _by_pattern(pattern: Mapping[str, int] | None, module: str, default: int) -> int:
    """A setting of one module: that of the first pattern that fits its name, else the whole adapter's."""
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


def tensors_digest(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """SHA-256 of settings and named tensors, independent of the tensors' order and of any file format."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
