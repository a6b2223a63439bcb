"""What a fusion must give on any architecture: nine checks, each against an oracle of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from loraflow import FusedModel, LoraFlow, Static
from loraflow.core.architecture import find_decoder_layers
from loraflow.core.reference import reference_gate
from loraflow.errors import LoraflowError
from loraflow.methods.qa_flora import QaFlora
from tests.tiny import set_random_gates
from tests.zoo.bases import Base
from tests.zoo.oracle import Gate, NoOracle, TokenByToken, merged, updates_of
from tests.zoo.replay import LENGTH, PROMPT, Abilities, Reader, random_words
from tests.zoo.targets import Targets, linears_of, other_rows

MIXTURE = {"one": 0.3, "two": 0.7}
OTHER = {"one": 1.2, "two": -0.4}
RANKS = {"one": 3, "two": 5}
BOUND, BOUND_IN_FLOAT32 = 1e-5, 1e-4
"""What an error may be, as a share of the adapters' own effect."""


class Unable(Exception):  # noqa: N818 (an outcome, not an error)
    """A check that the base does not allow, or PEFT."""


@dataclass(frozen=True)
class Outcome:
    """How a check ended.

    Attributes:
        kind: "ok"; "refused" by loraflow; "unable", where base or PEFT cannot do it or no oracle is known; "wrong"; or
            "raw", another error than loraflow's.
        detail: the largest error as a share of the adapters' own effect, or the message.
    """

    kind: str
    detail: str


class Case:
    """A base, two random adapters that PEFT wrote for it, and their fusion.

    Attributes:
        base: the base, as it is without adapters.
        targets: what the adapters adapt.
        reader: hands texts to models.
        abilities: what the base does by itself.
        layers: its decoder layers.
        words: two rows of them.
        plain: what the base says to them.
        paths: where the adapters are.
        logits: what PEFT's models say to them, by adapter.
        updates: what each adapter adds to parameters of the base.
    """

    def __init__(self, base: Base, targets: Targets, reader: Reader, directory: Path) -> None:
        self.base, self.targets, self.reader = base, targets, reader
        self.abilities = Abilities.of(base, reader)
        self.layers = find_decoder_layers(base.model)
        self.words = random_words(2)
        self.plain = reader.at_once(base.model, self.words)
        self.paths = {name: directory / name for name in RANKS}
        self.logits: dict[str, Tensor] = {}
        updates = [self._save(name, seed) for seed, name in enumerate(RANKS)]
        passed_over = self._passed_over(updates)
        self.updates = [{k: v for k, v in found.items() if k not in passed_over} for found in updates]

    @functools.cached_property
    def fused(self) -> FusedModel:
        """The fusion, under a method of constant weights at first."""
        return FusedModel.from_adapters(copy.deepcopy(self.base.unused), self.paths, "average")

    def merged(self, weights: Mapping[str, float] | Tensor) -> nn.Module:
        """The base with weights merged into it, `[layers, adapters]` or the same for all layers."""
        chosen = list(weights.values()) if isinstance(weights, Mapping) else weights
        return merged(self.base.model, self.updates, chosen, self._layer_of)

    def gated(self, granularity: str) -> FusedModel:
        """The fusion with random gates of LoRA-Flow."""
        self.fused.set_method(LoraFlow(granularity=granularity))
        set_random_gates(self.fused)
        return self.fused

    def by_the_oracle(self) -> Tensor:
        """What the slow oracle says to the first row with the gates in use; zero where it does not know."""
        gates = {site.removeprefix("layers."): _slow_gate(gate) for site, gate in self.fused.gates.items()}
        oracle = TokenByToken(
            copy.deepcopy(self.base.model),
            self.updates,
            self.layers.prefix,
            layer_gates={int(site): gate for site, gate in gates.items() if site.isdecimal()},
            module_gates={f"{self.layers.prefix}.{site}": gate for site, gate in gates.items()},
            stepwise=self.abilities.steps,
        )
        first = self.words[:1]
        with oracle.installed() as model:
            if not oracle.stepwise:
                return self.reader.at_once(model, first)
            steps = self.reader.step_by_step(model, first, 1)
            return torch.cat([steps, torch.zeros_like(steps[:, :1])], dim=1)

    def by_distance(self) -> Tensor:
        """Weights by how far an adapter moves each layer's output at the prompt's end, `[rows, layers, adapters]`."""
        alone = [self.merged(dict.fromkeys(RANKS, 0.0) | {name: 1.0}) for name in RANKS]
        prompts = self.words[:, :PROMPT]
        base, *others = (self._last_states(model, prompts) for model in (self.base.model, *alone))
        distances = torch.stack([(states - base).norm(dim=-1) for states in others], dim=-1) + QaFlora.epsilon
        return distances / distances.sum(dim=-1, keepdim=True)

    def error(self, found: Tensor, expected: Tensor, plain: Tensor | None = None) -> float:
        """The largest difference at the words whose next word is known, as a share of the adapters' largest effect.

        Args:
            found: logits at all words, or at those that `step_by_step` gives.
            expected: logits at all words.
            plain: the base's, where they are not those of `words`.

        Raises:
            Unable: if the adapters have no effect.
        """
        plain = self.plain[: len(expected)] if plain is None else plain
        asked = slice(LENGTH - 1 - min(found.shape[1], LENGTH - 1), LENGTH - 1)
        effect = (expected[:, asked] - plain[:, asked]).abs().max().item()
        if not effect > 1e-6:
            raise Unable("the adapters change nothing")
        return (found[:, : LENGTH - 1] - expected[:, asked]).abs().max().item() / effect

    def require_batches(self) -> None:
        """Give the check up where rows change one another without adapters.

        Raises:
            Unable: if they do.
        """
        if not self.abilities.batches:
            raise Unable("in a batch the rows of the base itself change one another")

    def generated(self, words: Tensor, **kwargs: object) -> Tensor:
        """What the fusion says step by step.

        Raises:
            Unable: if the base by itself says something else with a cache.
        """
        if not self.abilities.caches:
            raise Unable("with a cache the base itself differs")
        return self.reader.step_by_step(self.fused, words, **kwargs)

    def _save(self, name: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: PeftModel = get_peft_model(
                    copy.deepcopy(self.base.model), self.targets.config(RANKS[name])
                ).eval()
                model.save_pretrained(str(self.paths[name]))
                self.logits[name] = self.reader.at_once(model, self.words)
        except Exception as error:
            raise Unable(f"PEFT: {type(error).__name__}: {error}") from error
        return updates_of(model)

    def _passed_over(self, updates: Sequence[Mapping[str, Tensor]]) -> set[str]:
        """Parameters that the base reads past their module, so that adapters on it do nothing in PEFT either."""
        changed = {name.rpartition(".")[0] for found in updates for name in found}
        linears = [name for name in linears_of(self.base.model, self.layers) if name in changed]
        names = {f"{name}.weight" for name in other_rows(self.base, self.layers, linears, self.reader).uncalled}
        without_module = merged(self.base.model, [{k: v for k, v in updates[0].items() if k in names}], [1.0])
        return set() if torch.equal(self.reader.at_once(without_module, self.words), self.plain) else names

    def _last_states(self, model: nn.Module, words: Tensor) -> Tensor:
        """What each layer gives at the last word, `[rows, layers, hidden]`."""
        seen: list[Tensor] = []

        def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.dim() != 3:
                raise NoOracle(f"a decoder layer gives {states.dim()} dimensions")
            seen.append(states[:, -1])

        handles = [layer.register_forward_hook(note) for layer in model.get_submodule(self.layers.prefix)]
        try:
            self.reader.at_once(model, words)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(seen, dim=1)

    def _layer_of(self, name: str) -> int:
        place = self.layers.split(name)
        assert place is not None
        return place[0]


# ---- The checks: each gives the largest error ---------------------------------------------------------------------


def one_adapter(case: Case) -> float:
    """One adapter alone is what PEFT makes of it."""
    errors = []
    for name, expected in case.logits.items():
        with case.fused.using(name):
            errors.append(case.error(case.reader.at_once(case.fused, case.words), expected))
    return max(errors)


def mixture(case: Case) -> float:
    """A constant mixture is the base with merged weights."""
    case.fused.set_method(Static(MIXTURE))
    expected = case.reader.at_once(case.merged(MIXTURE), case.words)
    return case.error(case.reader.at_once(case.fused, case.words), expected)


def cache(case: Case) -> float:
    """A constant mixture with the cache is the base with merged weights without."""
    case.fused.set_method(Static(MIXTURE))
    expected = case.reader.at_once(case.merged(MIXTURE), case.words)
    return case.error(case.generated(case.words), expected)


def rows(case: Case) -> float:
    """Rows of a batch with constants of their own are the rows alone."""
    return _rows(case, [MIXTURE, OTHER], [case.merged(MIXTURE), case.merged(OTHER)])


def token(case: Case) -> float:
    """Weights of each token's own, one gate for each layer, are those of the slow oracle."""
    fused = case.gated("layer")
    return case.error(case.reader.at_once(fused, case.words)[:1], case.by_the_oracle())


def token_cache(case: Case) -> float:
    """Weights of each token's own with the cache are those of the slow oracle."""
    case.gated("layer")
    expected = case.by_the_oracle()
    # Alone, and as one row of two.
    return max(case.error(case.generated(words)[:1], expected) for words in (case.words[:1], case.words))


def token_rows(case: Case) -> float:
    """A row with gates beside one with constants: each is the row alone."""
    fused = case.gated("layer")
    return _rows(case, [None, OTHER], [fused, case.merged(OTHER)])


def module(case: Case) -> float:
    """Weights of each token's own, one gate for each linear, are those of the slow oracle, with the cache too."""
    fused = case.gated("module")
    expected = case.by_the_oracle()
    error = case.error(case.reader.at_once(fused, case.words)[:1], expected)
    return max(error, case.error(case.generated(case.words)[:1], expected)) if case.abilities.caches else error


def query(case: Case) -> float:
    """Weights of a whole prompt (qa-FLoRA) are those of the slow oracle while it is answered, images included."""
    errors = []
    if not case.reader.inputs:
        case.fused.set_method("qa-flora")
        errors.append(_constant_for_each_row(case, case.fused.weigh(case.words[:, :PROMPT])))
    # Where layers hand on several streams, the oracle does not know what is a state: what was weighed is left.
    with contextlib.suppress(*([NoOracle] if errors else [])):
        weights = case.by_distance()
        case.fused.set_method(QaFlora(distance="euclidean"))
        errors.append(_constant_for_each_row(case, weights))
    return max(errors)


def _constant_for_each_row(case: Case, weights: Tensor) -> float:
    case.require_batches()
    models = [case.merged(row) for row in weights]
    expected = _each(case.reader.at_once, models, [row[None] for row in case.words])
    # Whose image it is can be told of one prompt only.
    rows = case.words.split(1) if case.reader.inputs else [case.words]
    return case.error(torch.cat([case.generated(row) for row in rows]), expected)


CHECKS: dict[str, Callable[[Case], float]] = {
    "one": one_adapter,
    "mixture": mixture,
    "cache": cache,
    "rows": rows,
    "token": token,
    "token cache": token_cache,
    "token rows": token_rows,
    "module": module,
    "query": query,
}


def run_checks(base: Base, targets: Targets, reader: Reader, directory: Path) -> dict[str, Outcome]:
    """Every check on one base with adapters of the same targets."""
    try:
        case = Case(base, targets, reader, directory)
    except Unable as reason:
        return dict.fromkeys(CHECKS, Outcome("unable", str(reason)))
    return {name: _run(check, case) for name, check in CHECKS.items()}


def _run(check: Callable[[Case], float], case: Case) -> Outcome:
    try:
        error = check(case)
    except LoraflowError as error:
        return Outcome("refused", str(error))
    except (Unable, NoOracle) as reason:
        return Outcome("unable", str(reason))
    except Exception as error:
        return Outcome("raw", f"{type(error).__name__}: {error}")
    right = error <= (BOUND if case.base.precise else BOUND_IN_FLOAT32)
    return Outcome("ok" if right else "wrong", f"{error:.1e}")


def _rows(case: Case, methods: list, alone: list[nn.Module]) -> float:
    """Rows together in one forward, and generated after padding where the base allows it, against each alone."""
    case.require_batches()
    reader, words = case.reader, case.words
    expected = _each(reader.at_once, alone, [row[None] for row in words])
    error = case.error(reader.at_once(case.fused, words, methods=methods), expected)
    if not case.abilities.caches:
        return error
    padding = 2 if case.abilities.pads else 0
    texts = reader.alone(words, padding)
    plain = _each(reader.whole, [case.base.model] * len(texts), texts)
    found = case.generated(words, padding=padding, methods=methods)
    return max(error, case.error(found, _each(reader.whole, alone, texts), plain))


def _each(read: Callable[[nn.Module, Tensor], Tensor], models: Sequence[nn.Module], texts: Sequence[Tensor]) -> Tensor:
    return torch.cat([read(model, text) for model, text in zip(models, texts, strict=True)])


def _slow_gate(gate: nn.Module) -> Gate:
    def weights(x: Tensor) -> Tensor:
        return reference_gate(x, gate.weight, gate.bias).detach()

    return weights
