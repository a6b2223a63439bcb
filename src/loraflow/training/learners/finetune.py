r"""Training an adapter's own weights on the same few examples: what fusing existing adapters has to be better than.

A new LoRA, on the base or on top of a fusion, or one more round for an existing one; by PEFT, and otherwise by the
recipe of `training.fit`: the same prompts, loss on the response only, schedule, checkpoints and choice on dev examples.

On top of a fusion, PEFT wraps the fused linears as it would the base's: with the LoRA's A and B, scaled by s,

$$y = f(x) + s B A\, x, \qquad f(x) = W x + \sum_i w_i s_i B_i A_i x$$

and only A and B learn. What PEFT saves opens on the base alone too, but has learned beside f.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from loraflow.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterSource,
    load_adapter,
    match_adapter,
    tensors_digest,
    write_keys,
)
from loraflow.answers import require_tokenizer
from loraflow.bases import BaseOptions, base_record, choose, with_tokens
from loraflow.core.attach import open_base
from loraflow.core.fusion import Fusion
from loraflow.core.layers import FusedDecoderLayer
from loraflow.errors import FusionError, LoraflowError
from loraflow.examples import Example
from loraflow.files import make_folder, write_atomically
from loraflow.methods.on_top import put_on_top
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import fusion_digest
from loraflow.training.checkpoints import run_directory
from loraflow.training.config import LEARNING_RATE, FitConfig, FitResult, LoraSettings, Run
from loraflow.training.data import prepare
from loraflow.training.loss import labelled_forward
from loraflow.training.processes import here
from loraflow.training.reporting import check_trackers
from loraflow.training.trainer import as_it_was, train

_SAVE_AGAIN = "Save it with PEFT's `save_pretrained`, with `target_modules`, and nothing of the base in it."


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(FitResult):
    """What a fine-tuning did.

    Attributes:
        output: directory of the trained adapter.
        parameters: number of trained values.
    """

    output: Path
    parameters: int


def finetune(
    base: str | Path | PreTrainedModel | Fusion,
    examples: Sequence[Mapping[str, Any] | Example],
    output: str | Path,
    *,
    adapter: str | Path | AdapterSource | None = None,
    lora: LoraSettings | None = None,
    dev: Sequence[Mapping[str, Any] | Example] | None = None,
    config: FitConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: PromptFormat | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reports: str | Path | None = None,
    console: Console | None = None,
    options: BaseOptions | None = None,
) -> FinetuneResult:
    """Train a new LoRA, or an existing adapter further, and save it as an ordinary PEFT adapter.

    Args:
        base: Hub id, path, or a loaded transformers model, which is given back as it was. Or a fusion, which answers
            while the new LoRA learns what is missing, and stays as it is; `FusedModel.finetune` puts the two together.
        examples: training examples, `{"prompt", "completion"}` or `{"messages"}`.
        output: directory for the adapter; one that is there is replaced only by a finished one.
        adapter: the existing adapter to go on from, which is only read; None trains a new one.
        lora: what a new one is like; by default as the paper's adapters.
        dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
        config: the recipe; by default that of `fit` with a learning rate of 2e-4.
        tokenizer: by default the base's, where `base` is an id or path, and a fusion's own.
        prompt: how questions become prompts; by default by the existing adapter's chat template, if it brings one, or
            else the tokenizer's, if it has one; on a fusion, its own format.
        checkpoints: directory for checkpoints; a temporary one by default.
        resume: go on from the newest whole checkpoint there.
        overwrite: start over where there is an interrupted run.
        reports: directory for files of `config.report_to`; by default one in `runs`.
        console: where progress is shown; standard error by default.
        options: precision, placement and quantisation of a base given by id or path.

    Returns:
        Losses, time, and which examples were cut.

    Raises:
        AdapterError: if the existing adapter cannot be read, or does not fit the base.
        LoraflowError: if arguments exclude each other, or a resumed run differs from the interrupted one.
        MethodError: if nothing can be trained on top of the fusion.
    """
    started = time.perf_counter()
    config = config or FitConfig(learning_rate=LEARNING_RATE)
    output = Path(output).expanduser()
    _check_arguments(output, adapter, lora, config)
    check_trackers(config.report_to, weights=False)
    if isinstance(base, Fusion):
        ground = _on_fusion(base, tokenizer, prompt, adapter, options)
    else:
        ground = _on_base(base, tokenizer, prompt, adapter, options, output)
    processes = here(ground.model)
    if ground.fusion is not None and processes.count > 1:
        raise LoraflowError(f"On a fusion an adapter is trained in one process, and there are {processes.count}.")
    described = ground.adapter or lora or LoraSettings()
    identity = {
        **ground.identity,
        "adapter": dataclasses.asdict(described) if isinstance(described, LoraSettings) else described.digest,
    }
    with contextlib.ExitStack() as stack:
        folder = run_directory(checkpoints, resume=resume, overwrite=overwrite)
        directory = stack.enter_context(processes.fitting(folder))
        files, console = Path(reports) if reports is not None else None, processes.console(console)
        lasting = checkpoints is not None
        run = Run(config, directory, resume, console, reports=files, lasting=lasting, processes=processes)
        set_seed(config.seed)
        stack.enter_context(_at_work(ground.fusion))
        adapted = stack.enter_context(_adapted(ground.model, described))
        if ground.fusion is not None:
            _check_targets(ground.fusion)
        trained = TrainedAdapter(adapted, ground.tokenizer, ground.prompt)
        data = prepare(trained, examples, dev, config)
        identity |= {"data": data.digest, "config": config.identity()}
        outcome, _ = train(trained, data, run, json.loads(json.dumps(identity)), "fine-tuning")
        parameters = sum(parameter.numel() for parameter in trained.learned().values())
        seconds = time.perf_counter() - started
        # PEFT may have to put parts of the model together, for which it needs all processes.
        written = _files(adapted)
        processes.ask(lambda: _save(*written, output))
    done = dataclasses.replace(outcome, seconds=seconds, truncated=data.train.truncated)
    return FinetuneResult(**vars(done), output=output, parameters=parameters)


@dataclass(frozen=True)
class _Ground:
    """What an adapter is trained in, and what makes two trainings there the same one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptFormat
    identity: dict[str, Any]
    adapter: Adapter | None = None
    fusion: Fusion | None = None


def _on_base(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptFormat | None,
    adapter: str | Path | AdapterSource | None,
    options: BaseOptions | None,
    output: Path,
) -> _Ground:
    old = load_adapter("adapter", adapter) if adapter is not None else None
    if old is not None and output.resolve() == Path(old.source.path).resolve():
        raise LoraflowError(f"`output` (={str(output)!r}) is the adapter that is trained further. Give another place.")
    model, tokenizer = open_base(base, tokenizer, options)
    tokenizer = require_tokenizer(tokenizer)
    if old is not None:
        match_adapter(old, model)
    record = base_record(model)
    choice = choose(
        prompt or PromptFormat(), tokenizer, {"adapter": old.source} if old is not None else {}, record.vocab_size
    )
    tokenizer = with_tokens(tokenizer, choice.tokens)
    identity = {"base": record.model_dump(exclude={"path", "revision"})}
    return _Ground(model, tokenizer, choice.prompt.resolve(tokenizer), identity, old)


def _on_fusion(
    fusion: Fusion,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptFormat | None,
    adapter: str | Path | AdapterSource | None,
    options: BaseOptions | None,
) -> _Ground:
    fusion.attachment.check_attached()
    if adapter is not None:
        raise LoraflowError(
            f"`adapter` (={str(adapter)!r}) is an existing one, and on a fusion a new one is trained. Give `lora`."
        )
    if options is not None:
        raise LoraflowError("`options` say how a base is loaded, but `base` is a fusion. Leave them out.")
    # What cannot have an adapter on top is refused before anything is trained.
    put_on_top(fusion.own_method, "on top")
    tokenizer = require_tokenizer(tokenizer or fusion.tokenizer)
    adapters = [(one.name, one.digest) for one in fusion.adapters]
    learned = tensors_digest(fusion.state_dict())
    on = fusion_digest(fusion.base_record, adapters, fusion.own_method, learned)
    identity = {"base": fusion.base_record.model_dump(exclude={"path", "revision"}), "on": on}
    return _Ground(
        fusion.attachment.model, tokenizer, (prompt or fusion.prompt).resolve(tokenizer), identity, fusion=fusion
    )


@contextlib.contextmanager
def _at_work(fusion: Fusion | None) -> Iterator[None]:
    """Let a fusion's own method weigh inside the block, its gates beside the base, where PEFT finds none of them."""
    if fusion is None:
        yield
        return
    with fusion.learning(), fusion.evaluating(), fusion.at_work():
        layers = fusion.attachment.fusions
        gates = [layer.gates for layer in layers]
        learning = [parameter for own in gates for parameter in own.parameters() if parameter.requires_grad]
        try:
            for layer in layers:
                layer.gates = nn.ModuleDict()
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for layer, own in zip(layers, gates, strict=True):
                layer.gates = own
            for parameter in learning:
                parameter.requires_grad_(True)


def _check_targets(fusion: Fusion) -> None:
    """Check that a fusion can have an adapter where PEFT has put a new one.

    Raises:
        LoraflowError: if it cannot.
    """
    layers, method = fusion.attachment.layers, fusion.own_method
    for name, module in fusion.attachment.model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        place = layers.split(name)
        if place is None:
            raise LoraflowError(
                f"`target_modules` reaches '{name}', which is outside the decoder layers ({layers.prefix}), where a "
                "fusion has no adapters. Name modules that are inside of them."
            )
        rows = cast(FusedDecoderLayer, layers.layers[place[0]]).fusion.context.rows.of(place[1])
        if method.level == "token" and method.place != "module" and rows in ("prompts", "unknown"):
            raise LoraflowError(
                f"`target_modules` reaches '{name}', which does not read the layer's tokens one by one, so the method "
                f"{method.name!r} cannot stand beside an adapter there. Name other modules."
            )


class TrainedAdapter(nn.Module):
    """A base model with one PEFT adapter, as the trainer takes it: its `state_dict` holds the adapter alone."""

    # transformers' Trainer refuses a quantised model unless adapters are said to be loaded on it.
    _hf_peft_config_loaded = True
    # What is trained is whole in every process, however the base is stored: Trainer need not refuse to go on with it.
    is_distributed_loading_by_transformers = False
    main_input_name = "input_ids"

    def __init__(self, peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.tokenizer = tokenizer
        self.prompt = prompt

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not its own are the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "peft_model":
                raise
            return getattr(self.peft_model, name)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss can be averaged over the tokens of several forwards; the Trainer asks."""
        base = self.peft_model.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def forward(self, **inputs: Any) -> Any:
        """The base model's forward, with the adapter in it, and a head that reads the answers only."""
        return labelled_forward(self.peft_model, **inputs)

    def learned(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, by name."""
        return {name: p for name, p in self.peft_model.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter's tensors."""
        return {name: parameter.detach() for name, parameter in self.learned().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; all of it, whatever `strict` says.

        Raises:
            FusionError: if keys are missing or unknown.
        """
        learned = self.learned()
        if learned.keys() != state_dict.keys():
            wrong = sorted(learned.keys() ^ state_dict.keys())[0]
            raise FusionError(f"The checkpoint is of another adapter: '{wrong}' is missing or unknown. Start afresh.")
        for name, parameter in learned.items():
            parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


def _check_arguments(output: Path, adapter: Any, lora: LoraSettings | None, config: FitConfig) -> None:
    if adapter is not None and lora is not None:
        raise LoraflowError("`lora` describes a new adapter, and `adapter` is an existing one. Give one of them.")
    if config.adapter_dropout:
        raise LoraflowError(
            f"`adapter_dropout` (={config.adapter_dropout}) is for fitting a fusion. "
            "Give `LoraSettings.dropout`; an existing adapter keeps its own."
        )
    if output.is_file():
        raise LoraflowError(f"`output` (={str(output)!r}) is a file. Give a directory.")


@contextlib.contextmanager
def _adapted(model: PreTrainedModel, adapter: Adapter | LoraSettings) -> Iterator[PeftModel]:
    """The model with a trainable adapter inside the block, and afterwards as it was before."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with as_it_was(model):
        try:
            adapted = _existing(model, adapter) if isinstance(adapter, Adapter) else _new(model, adapter)
            try:
                yield adapted
            finally:
                adapted.unload()
        finally:
            _remove_layers(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])


def _remove_layers(model: PreTrainedModel) -> None:
    """Take out what PEFT left in a model when it failed half-way."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _new(model: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        # PEFT says it is whole, and only ever divides it.
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise LoraflowError(f"`target_modules` (={targets!r}): {error}") from error


def _existing(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    path, where = adapter.source.path, {}
    if not adapter.source.is_local:
        user, repo, *folders = path.strip("/").split("/")
        path = f"{user}/{repo}"
        where = {"subfolder": "/".join(folders) or None, "revision": adapter.source.revision}
    config = adapter.config
    if adapter.copies or config.modules_to_save or config.bias != "none":
        raise LoraflowError(
            f"The adapter {path!r} cannot be trained further: PEFT would train parts of the base with it "
            f"(`modules_to_save` = {config.modules_to_save}, `bias` = {config.bias!r}, saved of the base: "
            f"{sorted(adapter.copies) or 'nothing'}). {_SAVE_AGAIN}"
        )
    ours = write_keys(match_adapter(adapter, model).modules)
    adapted = PeftModel.from_pretrained(model, path, is_trainable=True, **cast(Any, where))
    theirs = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # We read more than PEFT does (keys without its prefix, null `target_modules`); what it cannot read it makes up.
    other = [key for key in {**ours, **theirs} if not _equal(theirs.get(key), ours.get(key))]
    if other:
        raise LoraflowError(
            f"The adapter {path!r} cannot be trained further: PEFT reads {other[0]!r} otherwise than a fusion. "
            f"{_SAVE_AGAIN}"
        )
    return adapted


def _equal(theirs: Tensor | None, ours: Tensor | None) -> bool:
    if theirs is None or ours is None:
        return False
    return torch.equal(theirs.to("cpu", torch.float32), ours.to("cpu", torch.float32))


def _files(adapted: PeftModel) -> tuple[dict[str, Any], bytes]:
    """What PEFT writes: the adapter's configuration and its weights."""
    with tempfile.TemporaryDirectory() as directory:
        # Without a look at the Hub for the base's vocabulary: embeddings are never trained here.
        adapted.save_pretrained(directory, save_embedding_layers=False)
        config = json.loads((Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = (Path(directory) / WEIGHTS_FILE).read_bytes()
    if isinstance(config.get("target_modules"), list):
        # PEFT keeps a set, whose order changes from run to run.
        config["target_modules"].sort()
    return config, weights


def _save(config: Mapping[str, Any], weights: bytes, output: Path) -> None:
    """Write PEFT's two files so that a crash leaves a whole adapter, or a directory that is none."""
    make_folder(output)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    write_atomically(output / WEIGHTS_FILE, weights)
    write_atomically(output / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
