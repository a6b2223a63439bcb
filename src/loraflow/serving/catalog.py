"""What a server offers by name: the base, its adapters, and fusions of some of them, all in one model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraflow.adapters import Adapter, all_adapters, load_adapter, tensors_digest
from loraflow.bases import AddedTokens, BaseOptions, check_base, choose, find_tokenizer, read_base_config
from loraflow.core.attach import Attachment
from loraflow.core.lanes import Gates, load_gates
from loraflow.endings import Endings
from loraflow.errors import LoraflowError, MethodError, did_you_mean
from loraflow.methods import Method, QueryMethod, Static, make_method
from loraflow.methods.checks import check_weights
from loraflow.model import FusedModel, check_adapter_names
from loraflow.prompts import PromptFormat
from loraflow.saved.fusion import Permit, SavedFusion, fusion_digest
from loraflow.saved.records import CONFIG_FILE
from loraflow.serving.auto import AUTO, Auto, Picking
from loraflow.serving.jobs import Weigher
from loraflow.serving.joining import add_adapters, check_reads_nothing_else
from loraflow.serving.picking import check_method, check_options, limited, method_of
from loraflow.serving.served import Kind, Served, try_gates, unlearned_method, weigher_of

# Methods whose gates are kept for further requests; parameters are the clients' to choose.
_KEPT = 16


class Catalog:
    """The models of one server, over one base; adapters and fusions may come and go while it answers."""

    def __init__(self, model: FusedModel, base_id: str, base_root: str, asked: PromptFormat | None = None) -> None:
        # With every adapter that any of them needs.
        self.model = model
        self.base_id = base_id
        # What was asked for of the prompt format; adapters that bring a template fill what it leaves open.
        self._asked = asked or PromptFormat()
        # By name, the base first; replaced where it changes, so that readers need no lock.
        self.served: dict[str, Served] = {}
        # Gates of methods that requests ask for, such as Arrow's directions, which take a while to find.
        self._made: dict[str, Gates] = {}
        self._offer(self._make(base_id, "base", base_root, (), make_method("base", {}), (model.prompt, model.endings)))
        for adapter in model.adapters:
            self._offer(self._make_adapter(adapter))

    @classmethod
    def open(
        cls,
        base: str | Path | None,
        adapters: Mapping[str, Any] | None = None,
        fusions: Mapping[str, str] | None = None,
        *,
        base_id: str | None = None,
        prompt: PromptFormat | None = None,
        stop_strings: Sequence[str] = (),
        options: BaseOptions | None = None,
        auto: Auto | None = None,
    ) -> Catalog:
        """Load a base, adapters and saved fusions.

        Args:
            base: Hub id or directory; by default the first fusion's.
            adapters: further adapters by name, asked for alone and in weights; or a bank's, loaded as they are used.
            fusions: saved fusions by name.
            base_id: what requests call the base; by default its id, or its directory's name.
            prompt: how questions to the base and to adapters become prompts; fusions have a format of their own.
            stop_strings: answers of all of them end before the first of these too.
            options: precision, placement and quantisation of the base.
            auto: what picks adapters for requests to the model `auto`; None offers no such model.

        Raises:
            FusionError: if a fusion was made with another base.
            LoraflowError: if there is no base, nothing to serve, or a name comes twice.
        """
        saved = [SavedFusion.open(path, name=name) for name, path in (fusions or {}).items()]
        if base is None:
            if not saved:
                raise LoraflowError("There is nothing to serve. Give a fusion, or a base and adapters.")
            base = saved[0].base
        union = all_adapters(adapters or {})
        with_names = [add_adapters(fusion, union) for fusion in saved]
        if not union:
            raise LoraflowError("There are no adapters to serve. Give `adapters=...`, or a fusion.")
        tokenizer, how = find_tokenizer(base, options or BaseOptions()), prompt
        if tokenizer is not None:
            # Adapters of fusions alone say nothing of how the base is asked.
            given = {name: union[name].source for name in adapters or {}}
            rows = read_base_config(base, options or BaseOptions()).get_text_config(decoder=True).vocab_size
            how = choose(prompt or PromptFormat(), tokenizer, given, rows).prompt.resolve(tokenizer)
        model = FusedModel.from_adapters(
            base, union, "base", tokenizer=tokenizer, prompt=how, stop_strings=stop_strings, options=options
        )
        name = base_id or (Path(base).name if Path(base).is_dir() else str(base))
        catalog = cls(model, name, str(base), prompt)
        for fusion, names in with_names:
            catalog._offer(catalog._make_saved(fusion, names))
        if auto is not None:
            catalog.offer_auto(auto)
        return catalog

    def load(self, name: str, path: str, permit: Permit = lambda path: path) -> Served:
        """Offer another adapter, or another saved fusion, while requests are answered.

        Where a new adapter comes into the model, all of them are stacked anew beside those in it, while requests go on.
        `permit` is called with every directory before it is read; it gives the one that is meant, or raises.

        Raises:
            LoraflowError: if the name is taken, or cannot be used; nothing has changed then.
        """
        check_adapter_names([name])
        if name in self.served:
            raise LoraflowError(f"There is a model {name!r} already. Unload it first, or give another name.")
        path = permit(path)
        before = self.model.adapters
        known = {adapter.name: adapter for adapter in before}
        if name in known:
            raise LoraflowError(f"The adapter {name!r} was unloaded, and requests still use it. Try again later.")
        fusion = SavedFusion.open(path, name=name) if (Path(path) / CONFIG_FILE).is_file() else None
        own: list[str] = []
        if fusion is None:
            known[name] = load_adapter(name, path)
        else:
            check_base(fusion.config.base, self.model.base_record)
            fusion, own = add_adapters(fusion, known, permit)
            check_reads_nothing_else(fusion.config)
            if name in known:
                raise LoraflowError(f"The fusion {name!r} has an adapter of the same name. Give it another.")
        present = {adapter.name for adapter in before}
        new = [adapter for adapter in known.values() if adapter.name not in present]
        for adapter in new:
            check_adapter_names([adapter.name])
            if adapter.name in self.served:
                raise LoraflowError(
                    f"The fusion {name!r} has an adapter {adapter.name!r}, and there is another model of that name. "
                    "Unload that first, or give the adapter another name."
                )
        if new:
            self.model.exchange_adapters(list(known.values()))
        try:
            offered = [self._make_adapter(adapter) for adapter in new]
            offered += [] if fusion is None else [self._make_saved(fusion, own)]
            self._check_auto(offered)
        except BaseException:
            # Nobody has heard of them yet.
            if new:
                self.model.exchange_adapters(before)
            raise
        self._offer(*offered)
        return offered[-1]

    def offer_auto(self, auto: Auto) -> None:
        """Offer the model `auto`, which picks adapters for each request.

        It is asked as the base is, or where a fusion's method picks, as that.

        Raises:
            LoraflowError: if there is a model of that name.
            MethodError: if the method is unknown, cannot pick so, or learns and is no fusion's.
        """
        base, fusion = self.served[self.base_id], self.served.get(auto.method)
        if fusion is None or fusion.kind != "fusion":
            fusions = [one.id for one in self.served.values() if one.kind == "fusion"]
            method = method_of(auto, self.adapters, fusions)
            digest = self._digest((), (), method, {})
            like = dataclasses.replace(base, method=method, digest=digest, parent=self.base_id)
        else:
            if auto.options:
                raise MethodError(
                    f"{auto.method!r} is a fusion, whose method has its own parameters, and `{AUTO}` has options "
                    f"beside it (={dict(auto.options)}). Leave them out."
                )
            check_method(fusion.method)
            like = fusion
        offered = dataclasses.replace(like, id=AUTO, kind="auto", auto=auto)
        # What no request could have is told now.
        self.with_picks(offered)
        self._offer(offered)

    def withdraw(self, name: str) -> list[str]:
        """Offer a model no longer; `free` then takes what only it needed out of memory.

        Returns:
            Names of the adapters that nothing offered needs any more; requests that run may.

        Raises:
            LoraflowError: if there is no such model, it is the base, or an adapter that a fusion needs.
        """
        served = self.find(name)
        if served.kind in ("base", "auto"):
            what = "the base" if served.kind == "base" else "what picks among the adapters"
            raise LoraflowError(f"{name!r} is {what}, which stays. Unload an adapter or a fusion.")
        if served.kind == "fusion" and any(one.auto and one.auto.method == name for one in self.served.values()):
            raise LoraflowError(f"The fusion {name!r} is needed by {AUTO!r}, which picks by its method. It stays.")
        users = [one.id for one in self.served.values() if one.kind == "fusion" and name in one.adapters]
        if served.kind == "adapter" and users:
            raise LoraflowError(f"The adapter {name!r} is needed by {', '.join(map(repr, users))}. Unload that first.")
        self.served = {key: one for key, one in self.served.items() if key != name}
        return [adapter for adapter in self.model.adapter_names if adapter not in self.served]

    def free(self) -> None:
        """Take the adapters out of the model that nothing offered needs. No request may use them any more."""
        kept = [adapter for adapter in self.model.adapters if adapter.name in self.served]
        if len(kept) < len(self.model.adapters):
            self.model.exchange_adapters(kept)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are offered, in order."""
        return tuple(name for name in self.model.adapter_names if name in self.served)

    def adapters_of(self, served: Served) -> tuple[str, ...]:
        """Names of the adapters that a model weighs, or picks from; for `auto`, those that are offered now."""
        return served.adapters if served.adapters or served.kind != "auto" else self.adapters

    def is_current(self, served: Served) -> bool:
        """Whether a model is still offered, and its names mean the same adapters."""
        now = {adapter.name: adapter.digest for adapter in self.model.adapters}
        mine = zip(served.adapters, served.parts, strict=True)
        return served.id in self.served and all(
            name in self.served and now.get(name) == digest for name, digest in mine
        )

    def is_named(self, served: Served) -> bool:
        """Whether the model that a request named is offered as it was then, whatever else came or left."""
        now = self.served.get(served.id)
        return now is not None and now.digest == (served.origin or served.digest) and self.is_current(now)

    def _offer(self, *models: Served) -> None:
        for served in models:
            if served.id in self.served:
                raise LoraflowError(f"Two models are called {served.id!r}. Give each a name of its own.")
            self.served = {**self.served, served.id: served}

    def _make_adapter(self, adapter: Adapter) -> Served:
        model, alone = self.model, Static({adapter.name: 1.0})
        manner = model.prompt, model.endings
        choice = choose(self._asked, model.tokenizer, {adapter.name: adapter.source}, model.base_record.vocab_size)
        self._check_tokens(f"The adapter {adapter.name!r}", choice.tokens)
        if choice.brought and model.tokenizer is not None:
            prompt = choice.prompt.resolve(model.tokenizer)
            manner = prompt, Endings.find(prompt, model.tokenizer, model.generation_config, model.endings.stop)
        return self._make(adapter.name, "adapter", adapter.source.path, (adapter.name,), alone, manner)

    def _make_saved(self, fusion: SavedFusion, adapters: Sequence[str]) -> Served:
        check_base(fusion.config.base, self.model.base_record)
        model, prompt, endings = self.model, fusion.config.prompt, fusion.config.endings
        self._check_tokens(f"The fusion {fusion.name!r}", fusion.config.added_tokens)
        if model.tokenizer is not None:
            prompt = prompt.resolve(model.tokenizer)
        endings = endings or Endings.find(prompt, model.tokenizer, model.generation_config)
        manner = prompt, endings.and_stop(model.endings.stop, model.tokenizer)
        return self._make(fusion.name, "fusion", fusion.path, tuple(adapters), fusion.method, manner, fusion)

    def _check_tokens(self, what: str, tokens: AddedTokens) -> None:
        """Check that the one tokenizer of all has added tokens.

        Raises:
            LoraflowError: if it lacks one, or has it as another.
        """
        vocabulary = {} if self.model.tokenizer is None or not tokens else self.model.tokenizer.get_vocab()
        for text, token in tokens.items():
            if vocabulary.get(text) != token.id:
                raise LoraflowError(
                    f"{what} was made with the added token {text!r} ({token.id}), which the server's tokenizer does "
                    "not have. Start the server with it, so that all are read with its tokens."
                )

    def _make(
        self,
        name: str,
        kind: Kind,
        root: str,
        adapters: tuple[str, ...],
        method: Method,
        manner: tuple[PromptFormat, Endings],
        saved: SavedFusion | None = None,
    ) -> Served:
        attachment = self.model.attachment
        # Adapters may be called otherwise here than in the fusion, whose method knows them by its own names.
        tensors, names = ({}, adapters) if saved is None else (saved.tensors, saved.adapter_names)
        gates = attachment.make_gates(method, attachment.positions(adapters), names)
        load_gates(gates, tensors, f"the method of the fusion {name!r}")
        nn.ModuleList(gates.values()).requires_grad_(False)
        parts = _parts(attachment, adapters)
        return Served(
            id=name,
            kind=kind,
            root=root,
            parent=None if kind == "base" else self.base_id,
            digest=self._digest(adapters, parts, method, tensors),
            adapters=adapters,
            parts=parts,
            method=method,
            prompt=manner[0],
            endings=manner[1],
            gates=gates,
        )

    def _digest(
        self, adapters: Sequence[str], parts: Sequence[str], method: Method, tensors: Mapping[str, Tensor]
    ) -> str:
        return fusion_digest(self.model.base_record, zip(adapters, parts, strict=True), method, tensors_digest(tensors))

    def find(self, name: str) -> Served:
        """A model by its name.

        Raises:
            LoraflowError: if there is none; the message lists those that there are.
        """
        if name not in self.served:
            raise LoraflowError(f"There is no model {name!r}. {did_you_mean(name, self.served)}")
        return self.served[name]

    def with_weights(self, served: Served, weights: Mapping[str, float]) -> Served:
        """The same adapters under given weights, for one request; those that are not named get zero.

        Raises:
            MethodError: if an adapter is unknown, or a weight is no finite number.
        """
        attachment = self.model.attachment
        names = self._weighable(served, attachment)
        check_weights(weights, names, "adapter_weights")
        return self._with(served, names, Static({name: weights.get(name, 0.0) for name in names}), attachment)

    def with_method(self, served: Served, method: str, options: Mapping[str, Any]) -> Served:
        """The same adapters under another method, for one request.

        Raises:
            MethodError: if the method is unknown, a parameter is, or it would have to learn first.
        """
        attachment = self.model.attachment
        names = self._weighable(served, attachment)
        return self._with(served, names, unlearned_method(method, names, options, self.served.values()), attachment)

    def with_picks(
        self,
        served: Served,
        adapters: Sequence[str] | None = None,
        top_k: int | None = None,
        floor: float | None = None,
        method: tuple[str, Mapping[str, Any]] | None = None,
    ) -> Served:
        """What picks adapters for one request to `auto`.

        Args:
            served: `auto` as it is offered.
            adapters: the only ones that it may pick.
            top_k: how many it may pick at most.
            floor: one that scores less is not picked.
            method: another method that picks, and its options.

        Raises:
            MethodError: if an adapter or a method is unknown, or the method cannot do what is asked of it.
        """
        attachment = self.model.attachment
        assert served.auto is not None
        known = self._weighable(served, attachment)
        picking = served.auto.picking(known, adapters, top_k, floor)
        if served.gates and method is None:
            return served.fitted_picking(picking)
        return self._with_unlearned(served, picking, method or (served.auto.method, served.auto.options), attachment)

    def _with_unlearned(
        self, served: Served, picking: Picking, by: tuple[str, Mapping[str, Any]], attachment: Attachment
    ) -> Served:
        name, options = by
        check_options(options)
        chosen = unlearned_method(name, picking.adapters, options, self.served.values())
        check_method(chosen)
        found = self._with(served, picking.adapters, limited(chosen, picking), attachment)
        return found if not isinstance(chosen, QueryMethod) else found.with_picking(picking)

    def _check_auto(self, new: Sequence[Served]) -> None:
        """Check that `auto` can pick from adapters that come too, and make what it needs for that.

        Raises:
            MethodError: if it cannot.
        """
        names = [*self.adapters, *(one.id for one in new if one.kind == "adapter")]
        for served in self.served.values():
            if served.auto is not None and not served.adapters:
                picking = served.auto.picking(names, None, None, None)
                self._with_unlearned(served, picking, (served.auto.method, served.auto.options), self.model.attachment)

    def _weighable(self, served: Served, attachment: Attachment) -> tuple[str, ...]:
        """The adapters that a request may weigh: the fusion's own, or all that are offered."""
        if served.kind == "fusion" or (served.kind == "auto" and served.adapters):
            return served.adapters
        return tuple(adapter.name for adapter in attachment.adapters if adapter.name in self.served)

    def _with(self, served: Served, names: tuple[str, ...], method: Method, attachment: Attachment) -> Served:
        # One and the same attachment all the way, whatever comes or leaves meanwhile.
        parts = _parts(attachment, names)
        key = json.dumps([names, parts, method.name, method.parameters()], sort_keys=True)
        gates = self._made.pop(key, None)
        if gates is not None:
            # Those that were used last stay the longest.
            self._made[key] = gates
        else:
            gates = try_gates(self.model, method, attachment, attachment.positions(names))
            if method.level != "task":
                # Constant weights are cheap to make, and as many as there are requests.
                self._made[key] = gates
                if len(self._made) > _KEPT:
                    del self._made[next(iter(self._made))]
        digest = self._digest(names, parts, method, {})
        return dataclasses.replace(
            served, digest=digest, adapters=names, parts=parts, method=method, gates=gates, origin=served.digest
        )

    def weigher(self, served: Served, prompt: Sequence[int]) -> Weigher:
        """Who weighs a request; methods that read prompts read this one now, which takes some passes.

        Raises:
            LoraflowError: if an adapter has left the model.
        """
        return weigher_of(self.model, served, prompt)


def _parts(attachment: Attachment, adapters: Sequence[str]) -> tuple[str, ...]:
    return tuple(attachment.adapters[position].digest for position in attachment.positions(adapters))
