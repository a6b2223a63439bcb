"""What a server offers by name: the base, its adapters, and fusions of some of them, all in one model."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraflow.adapters import Adapter, AdapterSource, load_adapter
from loraflow.errors import FusionError, LoraflowError, MethodError, did_you_mean
from loraflow.layers import Gates
from loraflow.loading import BaseOptions
from loraflow.methods import Method, QueryMethod, Static, get_method, make_method
from loraflow.model import FusedModel
from loraflow.prompts import PromptFormat
from loraflow.rows import weigh_prompts
from loraflow.serving.engine import Weigher
from loraflow.storage import check_base, fetch_fusion, read_fusion, resolve_source, tensors_digest

Kind = Literal["base", "adapter", "fusion"]

# Methods whose gates are kept for further requests; parameters are the clients' to choose.
_KEPT = 16


class SpreadGate(nn.Module):
    """A gate for some of the adapters in the model, which gives the others zero."""

    def __init__(self, gate: nn.Module, positions: Sequence[int], adapters: int) -> None:
        super().__init__()
        self.gate = gate
        self.positions = list(positions)
        self.adapters = adapters

    def forward(self, x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "*weights adapters"]:
        """The gate's weights, each at its adapter's place."""
        own = self.gate(x)
        weights = own.new_zeros(*own.shape[:-1], self.adapters)
        weights[..., self.positions] = own
        return weights


@dataclass(frozen=True)
class Served:
    """One model that requests can name.

    Attributes:
        id: the name.
        kind: what it is.
        root: where it came from.
        parent: the base's name; None for the base itself.
        digest: of all that its answers depend on but the request: base, adapters, method and what that has learned.
        adapters: names of its adapters, in the order of its weights.
        method: who weighs them.
        prompt: how messages become prompts.
        gates: the method's gates, for all adapters in the model.
        own: the same for its own adapters alone, for methods that read prompts.
        created: when it was loaded, in seconds since 1970.
    """

    id: str
    kind: Kind
    root: str
    parent: str | None
    digest: str
    adapters: tuple[str, ...]
    method: Method
    prompt: PromptFormat
    gates: Gates = field(repr=False)
    own: Gates = field(repr=False)
    created: int = field(default_factory=lambda: int(time.time()))


class Catalog:
    """The models of one server, over one base.

    Attributes:
        model: the base with every adapter that any of them needs.
        served: all of them by name, the base first.
    """

    model: FusedModel
    served: dict[str, Served]

    def __init__(self, model: FusedModel, base_id: str, base_root: str) -> None:
        self.model = model
        self.base_id = base_id
        self.served = {}
        # Gates of methods that requests ask for, such as Arrow's directions, which take a while to find.
        self._made: dict[str, tuple[Gates, Gates]] = {}
        self._add(base_id, "base", base_root, (), make_method("base", {}), model.prompt)
        for adapter in model.adapters:
            alone = Static({adapter.name: 1.0})
            self._add(adapter.name, "adapter", adapter.source.path, (adapter.name,), alone, model.prompt)

    @classmethod
    def open(
        cls,
        base: str | Path | None,
        adapters: Mapping[str, str] | None = None,
        fusions: Mapping[str, str] | None = None,
        *,
        base_id: str | None = None,
        options: BaseOptions | None = None,
    ) -> Catalog:
        """Load a base, adapters and saved fusions.

        Args:
            base: Hub id or directory; by default the first fusion's.
            adapters: further adapters by name, which can be asked for alone and in weights.
            fusions: saved fusions by name.
            base_id: what requests call the base; by default its id, or its directory's name.
            options: precision, placement and quantisation of the base.

        Returns:
            The catalog.

        Raises:
            FusionError: if a fusion was made with another base.
            LoraflowError: if there is no base, nothing to serve, or a name comes twice.
        """
        read = {name: (fetch_fusion(path, None), path) for name, path in (fusions or {}).items()}
        configs = {name: read_fusion(directory) for name, (directory, _) in read.items()}
        if base is None:
            if not configs:
                raise LoraflowError("There is nothing to serve. Give a fusion, or a base and adapters.")
            name = next(iter(configs))
            base = resolve_source(configs[name][0].base.path, read[name][0])
            if not base:
                raise FusionError(f"The fusion {name!r} does not know where its base model is. Give --base.")
        union, names_of = _union(adapters or {}, {n: (configs[n][0], read[n][0]) for n in configs})
        if not union:
            raise LoraflowError("There are no adapters to serve. Give --lora-modules, or a fusion.")
        model = FusedModel.from_adapters(base, union, "base", options=options)
        catalog = cls(model, base_id or _short(str(base)), str(base))
        for name, (config, tensors) in configs.items():
            check_base(config.base, model._base)
            method = make_method(config.method.name, config.method.parameters)
            catalog.add_fusion(name, read[name][1], names_of[name], method, config.prompt, tensors)
        return catalog

    def add_fusion(
        self,
        name: str,
        root: str,
        adapters: Sequence[str],
        method: Method,
        prompt: PromptFormat,
        tensors: Mapping[str, Tensor],
    ) -> Served:
        """Offer a fusion of adapters that are in the model.

        Args:
            name: what requests call it.
            root: where it came from.
            adapters: its adapters, in order.
            method: who weighs them.
            prompt: how messages become prompts.
            tensors: what the method has learned, as `FusedModel.state_dict` gives it.

        Raises:
            FusionError: if the tensors are not the method's.
        """
        return self._add(name, "fusion", root, tuple(adapters), method, prompt, tensors)

    def _add(
        self,
        name: str,
        kind: Kind,
        root: str,
        adapters: tuple[str, ...],
        method: Method,
        prompt: PromptFormat,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Served:
        if name in self.served:
            raise LoraflowError(f"Two models are called {name!r}. Give each a name of its own.")
        positions = [self.model.adapter_names.index(adapter) for adapter in adapters]
        own = self.model._attachment.make_gates(method, positions)
        _load_gates(name, own, tensors or {})
        gates = own if isinstance(method, QueryMethod) else self._spread(own, positions)
        served = Served(
            id=name,
            kind=kind,
            root=root,
            parent=None if kind == "base" else self.base_id,
            digest=self._digest(adapters, method, tensors or {}),
            adapters=adapters,
            method=method,
            prompt=prompt,
            gates=gates,
            own=own,
        )
        self.served[name] = served
        return served

    def _spread(self, gates: Gates, positions: Sequence[int]) -> Gates:
        """Gates of some adapters as gates of all in the model."""
        count = len(self.model.adapters)
        if list(positions) == list(range(count)):
            return gates
        return {site: SpreadGate(gate, positions, count) for site, gate in gates.items()}

    def _digest(self, adapters: Sequence[str], method: Method, tensors: Mapping[str, Tensor]) -> str:
        by_name = {adapter.name: adapter.digest for adapter in self.model.adapters}
        facts = {
            "base": self.model._base.model_dump(exclude={"path"}),
            "adapters": [[name, by_name[name]] for name in adapters],
            "method": [method.name, method.parameters()],
            "learned": tensors_digest(tensors),
        }
        return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, name: str) -> Served:
        """A model by its name.

        Raises:
            LoraflowError: if there is none; the message lists those that there are.
        """
        if name not in self.served:
            raise LoraflowError(f"There is no model {name!r}. {did_you_mean(name, self.served)}")
        return self.served[name]

    def with_weights(self, served: Served, weights: Mapping[str, float]) -> Served:
        """The same adapters under given weights, for one request.

        Raises:
            MethodError: if an adapter is unknown, or a weight is no finite number.
        """
        names = served.adapters if served.kind == "fusion" else tuple(self.model.adapter_names)
        return self._with(served, names, get_method(dict(weights), list(names)))

    def with_method(self, served: Served, method: str, options: Mapping[str, Any]) -> Served:
        """The same adapters under another method, for one request.

        Raises:
            MethodError: if the method is unknown, a parameter is, or it would have to learn first.
        """
        names = served.adapters if served.kind == "fusion" else tuple(self.model.adapter_names)
        chosen = get_method(method, list(names), options)
        if chosen.learns:
            fitted = [s.id for s in self.served.values() if s.method.name == chosen.name]
            hint = f" Ask for one of the models {', '.join(map(repr, fitted))}." if fitted else ""
            raise MethodError(f"The method {chosen.name!r} learns, and a request cannot wait for that.{hint}")
        return self._with(served, names, chosen)

    def _with(self, served: Served, names: tuple[str, ...], method: Method) -> Served:
        positions = [self.model.adapter_names.index(name) for name in names]
        key = json.dumps([names, method.name, method.parameters()], sort_keys=True)
        made = self._made.get(key)
        if made is None:
            own = self._try_gates(method, positions)
            made = own, own if isinstance(method, QueryMethod) else self._spread(own, positions)
            if method.level != "task":
                # Constant weights are cheap to make, and as many as there are requests.
                self._made[key] = made
                if len(self._made) > _KEPT:
                    del self._made[next(iter(self._made))]
        own, gates = made
        return Served(
            id=served.id,
            kind=served.kind,
            root=served.root,
            parent=served.parent,
            digest=self._digest(names, method, {}),
            adapters=names,
            method=method,
            prompt=served.prompt,
            gates=gates,
            own=own,
            created=served.created,
        )

    def _try_gates(self, method: Method, positions: Sequence[int]) -> Gates:
        """Make gates, and let each weigh one token: what fails in a step fails all who are in it.

        Raises:
            LoraflowError: if the method refuses its parameters.
            MethodError: if it fails otherwise, as with parameters of a wrong type.
        """
        attachment = self.model._attachment
        sites = {name: site for place in attachment.sites.values() for name, site in place.items()}
        try:
            gates = attachment.make_gates(method, positions)
            for name, gate in gates.items():
                if not isinstance(method, QueryMethod):
                    gate(torch.zeros(1, 1, sites[name].features, device=self.model.device, dtype=self.model.dtype))
        except LoraflowError:
            raise
        except Exception as error:
            raise MethodError(f"The method {method.name!r} cannot weigh with these parameters: {error}") from error
        return gates

    def weigher(self, served: Served, prompt: Sequence[int]) -> Weigher:
        """Who weighs a request; methods that read prompts read this one now, which takes some passes."""
        if not isinstance(served.method, QueryMethod):
            return Weigher(served.method, served.gates)
        positions = [self.model.adapter_names.index(adapter) for adapter in served.adapters]
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with self.model._turn(), torch.no_grad():
            own = weigh_prompts(
                self.model._attachment,
                served.method,
                served.own.get("model"),
                ids,
                None,
                self.model.tokenizer,
                positions,
            )[0]
        weights = own.new_zeros(own.shape[0], len(self.model.adapters))
        weights[:, positions] = own
        return Weigher(weights=weights)


def _load_gates(name: str, gates: Gates, tensors: Mapping[str, Tensor]) -> None:
    wanted = {f"{site}.{key}" for site, gate in gates.items() for key in gate.state_dict()}
    if wanted != tensors.keys():
        wrong = sorted(wanted ^ tensors.keys())[0]
        raise FusionError(
            f"The fusion {name!r} does not fit its method: '{wrong}' is missing or unknown. Save it again."
        )
    for site, gate in gates.items():
        gate.load_state_dict({key: tensors[f"{site}.{key}"] for key in gate.state_dict()})
        gate.requires_grad_(False)


def _union(
    given: Mapping[str, str], fusions: Mapping[str, tuple[Any, Path]]
) -> tuple[dict[str, Adapter], dict[str, list[str]]]:
    """All adapters once, by name, and each fusion's names for its own; equal ones under several names are one.

    Raises:
        FusionError: if an adapter is not the one that its fusion was made with.
    """
    union: dict[str, Adapter] = {name: load_adapter(name, path) for name, path in given.items()}
    names_of: dict[str, list[str]] = {}
    for fusion, (config, directory) in fusions.items():
        names_of[fusion] = []
        for record in config.adapters:
            known = next((name for name, adapter in union.items() if adapter.digest == record.digest), None)
            if known is None:
                known = record.name if record.name not in union else f"{fusion}.{record.name}"
                source = AdapterSource(resolve_source(record.path, directory), record.revision)
                adapter = load_adapter(known, source)
                if adapter.digest != record.digest:
                    raise FusionError(
                        f"Adapter {record.name!r} ({source.path}) is not the one that the fusion {fusion!r} was made "
                        "with. Restore it, or fit again."
                    )
                union[known] = adapter
            names_of[fusion].append(known)
    return union, names_of


def _short(base: str) -> str:
    return Path(base).name if Path(base).is_dir() else base
