"""`FusedModel`: a transformers model with several LoRA adapters fused into it, used as any other."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any, SupportsIndex

from huggingface_hub import HfApi
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from loraflow import __version__, training
from loraflow.adapters import Adapter, AdapterBank, AdapterSource, BankEntry, load_adapter, tensors_digest
from loraflow.bases import BaseOptions, BaseRecord, Manner, base_record, check_base, choose, with_tokens
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.attach import attach, open_base
from loraflow.core.fusion import Fusion
from loraflow.core.names import check_adapter_names
from loraflow.core.swap import blank
from loraflow.endings import Endings
from loraflow.errors import FusionError, LoraflowError
from loraflow.examples import Example
from loraflow.files import write_atomically
from loraflow.methods import Method, get_method
from loraflow.methods.on_top import learned_below, put_on_top
from loraflow.prompts import PromptFormat
from loraflow.saved.card import model_card, on_top_card
from loraflow.saved.fusion import SavedFusion
from loraflow.saved.records import CARD_FILE, AdapterRecord, FusionConfig, MethodRecord, relative_source
from loraflow.saved.storage import copy_adapters, write_fusion
from loraflow.training import FitConfig, FitResult, LoraSettings


class FusedModel(Fusion):
    """A base model, ordered adapters, and the method that gives their fusion weights.

    Make one with `from_adapters` or `from_pretrained`. It is used as the base model is: `forward`, `generate`, and
    every attribute of the base (`config`, `device`, ...) are its own; transformers' `Trainer` and `pipeline` and
    lm-eval's `HFLM` take it as they take any model. Its `state_dict` holds what is learned, never the base.

    How it answers, weighs and traces is in `loraflow.core.fusion`; here is how it is made, fitted and saved.
    """

    @classmethod
    def from_adapters(
        cls,
        base: str | Path | PreTrainedModel,
        adapters: Mapping[str, str | Path | AdapterSource | Adapter | BankEntry],
        method: str | Method = "lora-flow",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt: PromptFormat | None = None,
        stop_strings: Sequence[str] = (),
        options: BaseOptions | None = None,
    ) -> FusedModel:
        """Fuse adapters into a base model.

        Args:
            base: Hub id, path, or a loaded transformers model (which is changed in place until `unload`).
            adapters: where each adapter is, by the name it gets; their order is that of the fusion weights. A
                directory, `user/repo` or `user/repo/subfolder`, each Hub id optionally `@revision`; or an
                `AdapterBank`, whose adapters are loaded as they are used.
            method: a method's name, an adapter's name (that one alone), or a method object.
            tokenizer: by default the base's, where `base` is an id or path.
            prompt: how questions become prompts; by default by the chat template that adapters bring, if all that bring
                one bring the same, or else the tokenizer's, if it has one.
            stop_strings: an answer ends before the first of these too; by default where the chat template, the
                tokenizer or the base ends it.
            options: precision, placement and quantisation of a base given by id or path.

        Returns:
            The fused model; in evaluation mode, unless a loaded base is not.

        Raises:
            AdapterError: if an adapter cannot be read, or does not fit the base.
            ArchitectureError: if the base is of a kind that cannot be fused.
            DataError: if adapters bring different chat templates, and none is given.
            LoraflowError: if the adapters' names cannot be used.
            MethodError: if the method is unknown, or a parameter of it is wrong.
        """
        names = list(adapters)
        check_adapter_names(names)
        resolved = get_method(method, names)
        bank, changes = None, 0
        loaded: Sequence[Adapter]
        if isinstance(adapters, AdapterBank):
            bank, changes = adapters, adapters.changes
            loaded = bank.stored()
        else:
            loaded = [_load(name, source) for name, source in adapters.items()]
        model, tokenizer = open_base(base, tokenizer, options)
        record = base_record(model)
        sources = {adapter.name: adapter.source for adapter in loaded}
        manner = choose(prompt or PromptFormat(), tokenizer, sources, record.vocab_size)
        fused = cls._attached(model, loaded, resolved, tokenizer, manner, record, None, stop_strings)
        fused.bank, fused.bank_changes = bank, changes
        return fused

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        adapters: Mapping[str, str | Path | AdapterSource | Adapter | BankEntry] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        stop_strings: Sequence[str] = (),
        options: BaseOptions | None = None,
    ) -> FusedModel:
        """Load a fusion that `save_pretrained` or `loraflow fit` wrote.

        Args:
            path: its directory, or its Hub id.
            base: another place of the same base model, or the loaded model.
            adapters: other places of the same adapters, by name; those not named are taken from where they were.
            tokenizer: by default the base's.
            revision: revision of a fusion on the Hub.
            stop_strings: an answer ends before the first of these too, beside the fusion's own ends.
            options: placement of the base; its precision and quantisation where they are to differ from those that
                the fusion was made with.

        Returns:
            The fused model, giving the logits it gave when it was saved.

        Raises:
            FusionError: if the base or an adapter is not the one that the fusion was made with.
        """
        saved = SavedFusion.open(path, revision)
        if isinstance(adapters, AdapterBank):
            # A bank is where adapters are, of other fusions too.
            adapters = {one.name: one for one in adapters.stored() if one.name in saved.adapter_names}
        saved, loaded = saved.load(adapters)
        method = saved.method
        base = saved.base if base is None else base
        if not isinstance(base, nn.Module):
            options = saved.base_options(base, options)
        loaded_base, tokenizer = open_base(base, tokenizer, options)
        record = base_record(loaded_base)
        check_base(saved.config.base, record)
        config = saved.config
        manner = Manner(config.prompt, "the fusion's own format", config.added_tokens)
        model = cls._attached(loaded_base, loaded, method, tokenizer, manner, record, config.endings, stop_strings)
        try:
            model.load_state_dict(saved.tensors)
        except FusionError:
            model.unload()
            raise
        model.training_record = saved.config.training
        return model

    @classmethod
    def _attached(
        cls,
        model: PreTrainedModel,
        adapters: Sequence[Adapter],
        method: Method,
        tokenizer: PreTrainedTokenizerBase | None,
        manner: Manner,
        record: BaseRecord,
        endings: Endings | None,
        stop_strings: Sequence[str],
    ) -> FusedModel:
        """Attach to a base; one that fails half-way is given back as it was."""
        _announce_to_pipelines()
        attachment = attach(model, find_decoder_layers(model), adapters)
        try:
            tokenizer = tokenizer if tokenizer is None else with_tokens(tokenizer, manner.tokens)
            fused = _class_for(cls, type(model))(attachment, method, tokenizer, manner.prompt, record, endings)
            fused.prompt_origin, fused.added_tokens = manner.origin, manner.tokens
            fused.endings = fused.endings.and_stop(stop_strings, tokenizer)
            return fused
        except BaseException:
            attachment.detach()
            raise

    def fit(
        self,
        examples: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        dev: Sequence[Mapping[str, Any]] | None = None,
        config: FitConfig | None = None,
    ) -> FitResult:
        """Learn what the method learns from examples; base and adapters stay as they are.

        Args:
            examples: each `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`; 200 are enough. Methods that
                learn from the adapters' own data want such examples of each adapter, by its name.
            dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
            config: the recipe; by default the method's own.

        Returns:
            Losses, time, and which examples were cut.
        """
        return training.fit(self, examples, dev=dev, config=config)

    def finetune(
        self,
        examples: Sequence[Mapping[str, Any] | Example],
        output: str | Path,
        *,
        name: str = "tuned",
        lora: LoraSettings | None = None,
        dev: Sequence[Mapping[str, Any] | Example] | None = None,
        **run: Any,
    ) -> training.FinetuneResult:
        """Train a new LoRA on top of the fusion, which stays as it is, and save the fusion with it.

        Args:
            examples: each `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`.
            output: directory for the fusion with one more adapter, of weight 1, beside the gates as they are. The
                adapter itself is there too, in a folder of `adapters`.
            name: of the new adapter.
            lora: what it is like; by default as the paper's adapters.
            dev: examples on which the best checkpoint is chosen; without them, the last one is kept.
            run: anything else that `loraflow.training.finetune` takes: `config`, `checkpoints`, `resume`, ...

        Returns:
            Losses, time, and which examples were cut.

        Raises:
            LoraflowError: if the name cannot be used.
        """
        output = Path(output).expanduser()
        check_adapter_names([name])
        if name in self.adapter_names:
            raise LoraflowError(f"The fusion has an adapter {name!r} already. Give the new one another `name`.")
        if output.is_file():
            raise LoraflowError(f"`output` (={str(output)!r}) is a file. Give a directory.")
        with tempfile.TemporaryDirectory() as place:
            result = training.finetune(self, examples, place, lora=lora, dev=dev, **run)
            self._save_on_top(output, load_adapter(name, place), result)
        return dataclasses.replace(result, output=output)

    def _save_on_top(self, directory: Path, adapter: Adapter, result: training.FinetuneResult) -> None:
        """Save the fusion with one more adapter on top of it."""
        with self.attachment.turn():
            own = self._choice.own
            learned = {
                f"{site}.{learned_below(own.method, key)}": tensor
                for site, gate in own.gates.items()
                for key, tensor in gate.state_dict().items()
            }
            (folder,) = copy_adapters([adapter], directory)
            config, method = self._config(directory, learned, copies=False), put_on_top(own.method, adapter.name)
            path = relative_source(str(folder), directory)
            config.adapters.append(AdapterRecord(name=adapter.name, path=path, digest=adapter.digest))
            config.method = MethodRecord(name=method.name, parameters=method.parameters())
            facts = {"steps": result.steps, "train_loss": result.train_loss, "dev_loss": result.dev_loss}
            config.training = {**(config.training or {}), f"on top: {adapter.name}": facts}
            write_fusion(directory, config, learned, model_card(config, self.num_learned_parameters()))
            write_atomically(folder / CARD_FILE, on_top_card(config).encode())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are learned, of how many."""
        learned, total = self.num_learned_parameters(), sum(p.numel() for p in self.parameters())
        print(f"trainable params: {learned:,} || all params: {total:,} || trainable%: {100 * learned / total:.4f}")

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        copy_adapters: bool = False,
        state_dict: Mapping[str, Tensor] | EllipsisType | None = ...,
        is_main_process: bool = True,
    ) -> None:
        """Write `fusion_config.json`, `fusion.safetensors` and a model card.

        Args:
            directory: where to; an older fusion there is replaced only by a complete new one.
            copy_adapters: copy local adapters into the directory, so that it can be moved elsewhere as it is.
            state_dict: given by transformers' `Trainer`: what is learned, or None for the model's own. The file that it
                goes on from, `model.safetensors`, is written then too.
            is_main_process: given by transformers' `Trainer` since 5.24: whether this one of several processes writes.

        Raises:
            FusionError: if the directory is a file, or an adapter that is to be copied has changed on disk.
        """
        if not is_main_process:
            return
        directory = Path(directory).expanduser()
        with self.attachment.turn():
            learned = self.state_dict() if state_dict is None or state_dict is ... else state_dict
            self._save(directory, learned, copy_adapters=copy_adapters, publish=False)
        if state_dict is not ...:
            write_atomically(directory / SAFE_WEIGHTS_NAME, save(dict(learned), metadata={"format": "pt"}))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save to a Hub repository, local adapters included, and return its address."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            # First, so that what cannot be saved leaves no empty repository.
            with self.attachment.turn():
                self._save(Path(directory), self.state_dict(), copy_adapters=True, publish=True)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload loraflow fusion")
            )

    def _save(self, directory: Path, learned: Mapping[str, Tensor], *, copy_adapters: bool, publish: bool) -> None:
        # What is written is the fusion's own, also inside a `using` block, and of one moment.
        with self.attachment.turn():
            self.attachment.check_attached()
            if directory.is_file():
                raise FusionError(f"{directory} is a file. Give a directory.")
            config = self._config(directory, learned, copies=copy_adapters)
            if publish and config.base.path.startswith("."):
                # A path of this machine means nothing elsewhere; whoever loads the fusion is asked for the base.
                config.base.path = ""
            write_fusion(directory, config, learned, model_card(config, self.num_learned_parameters()))

    def _config(self, directory: Path, learned: Mapping[str, Tensor], *, copies: bool) -> FusionConfig:
        base = self.base_record.model_copy(update={"path": relative_source(self.base_record.path, directory)})
        copied = [adapter for adapter in self.adapters if copies and adapter.source.is_local]
        places = dict(zip((adapter.name for adapter in copied), copy_adapters(copied, directory), strict=True))
        records = []
        for adapter in self.adapters:
            path = str(places.get(adapter.name, adapter.source.path))
            if adapter.source.is_local:
                path = relative_source(path, directory)
            records.append(
                AdapterRecord(name=adapter.name, path=path, revision=adapter.source.revision, digest=adapter.digest)
            )
        return FusionConfig(
            loraflow_version=__version__,
            base=base,
            adapters=records,
            method=MethodRecord(name=self.own_method.name, parameters=self.own_method.parameters()),
            prompt=self.prompt,
            endings=self.endings,
            added_tokens=self.added_tokens,
            training=self.training_record,
            weights_digest=tensors_digest(learned),
        )


def _refusing(name: str) -> Any:
    def refuse(self: FusedModel, *args: Any, **kwargs: Any) -> Any:
        """Refuse what transformers would do to the base beneath the fusion."""
        raise LoraflowError(
            f"`{name}` is of transformers' own adapters, which it would put around the fused ones, past the fusion "
            "weights. Name all adapters when the fusion is made (`FusedModel.from_adapters`), choose among them with "
            '`using("name")` or `set_method`, and see the base with `using("base")`.'
        )

    return refuse


# The base has them, and `__getattr__` would hand them on.
for _name in ("add_adapter", "delete_adapter", "disable_adapters", "enable_adapters", "load_adapter", "set_adapter"):
    setattr(FusedModel, _name, _refusing(_name))


_classes: dict[tuple[type, type], type[FusedModel]] = {}


def _class_for(cls: type[FusedModel], base_class: type[PreTrainedModel]) -> type[FusedModel]:
    """The class with the base's signature on `forward`: the Trainer reads from it which columns a model takes.

    It stands under no name of its own, and is pickled by the two that it is made for.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    def reduce(self: FusedModel, protocol: SupportsIndex) -> tuple[Any, ...]:
        return blank, (_class_for, cls, base_class), self.__getstate__()

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    made = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if (cls, base_class) not in _classes:
        _classes[cls, base_class] = type(cls.__name__, (cls,), made)
    return _classes[cls, base_class]


def _load(name: str, source: str | Path | AdapterSource | Adapter | BankEntry) -> Adapter:
    if isinstance(source, Adapter):
        return source.called(name)
    return load_adapter(name, source.source if isinstance(source, BankEntry) else source)


def _announce_to_pipelines() -> None:
    """Let `transformers.pipeline` know the class, as it knows PEFT's: it reports unknown ones as unsupported."""
    from transformers.pipelines import base as pipelines

    names = getattr(pipelines, "SUPPORTED_PEFT_TASKS", {}).get("text-generation", [])
    if FusedModel.__name__ not in names:
        names.append(FusedModel.__name__)
