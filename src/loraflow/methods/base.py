"""The contract of a method: what it looks at, where its weights differ, what it learns, and how it gives them.

| level | looks at | gives weights through |
|---|---|---|
| `task` | nothing | a gate that ignores its input |
| `query` | the whole prompt, before generation | `weigh`, once for each request; a `ScoredMethod` scores first |
| `token` | each position of its place's input | a gate |

A *gate* is a module that reads an input `x` and gives the fusion weights, one for each adapter:

```python
gate(x: Float[Tensor, "batch seq features"]) -> Float[Tensor, "batch seq adapters"]
```

A method that looks at tokens may look at the whole prompt first (`reads_prompt`): what its `prior` says of each
adapter, once for each request, its gates get beside each input, as `gate(x, prior)`.

Weights that do not depend on the input may be given as `[adapters]`, those of whole rows as `[batch, adapters]`; they
are broadcast. `place` says where gates stand: one for the whole model, for each layer, or for each linear module.

A gate of a linear module may also add an update of its own, which no weight multiplies (`Method.adds`, `AddsUpdate`).

Another package adds a method by subclassing `Method` or `QueryMethod` and naming it as an entry point:

```toml
[project.entry-points."loraflow.methods"]
my-method = "my_package:MyMethod"
```
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loraflow.adapters import LoraModule
from loraflow.errors import MethodError

Level = Literal["task", "query", "token"]
Place = Literal["model", "layer", "module"]
Mixing = Literal["outputs", "parameters"]
Learning = str
"""The name of a learner in `loraflow.training.learners`: "gradient" and gradient-free "search" learn on examples of the
task at hand; "experts", by gradient with one adapter alone, "together", by gradient with all but a few, and "samples",
by looking, on each adapter's own data. What they need of the method and its gates is in the protocols below."""


@dataclass(frozen=True)
class Site:
    """One place that a gate serves.

    Attributes:
        adapters: names of the adapters, in order.
        features: width of the input that the gate reads.
        layers: number of decoder layers of the model.
        layer: index of the decoder layer; 0 for a gate of the whole model.
        module: name within the layer, for a gate of one module.
        updates: each adapter's update of the linears that the gate serves, by their name within the site (for the whole
            model `layers.3.self_attn.q_proj`, for a layer `self_attn.q_proj`); None where one does not target it.
    """

    adapters: tuple[str, ...]
    features: int
    layers: int
    layer: int = 0
    module: str | None = None
    updates: Mapping[str, Sequence[LoraModule | None]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Method(ABC):
    """What gives the fusion weights. Subclasses are frozen dataclasses of their parameters, which are saved as JSON.

    Where gates stand decides what they read: at `"model"` (one gate) the input of the first decoder layer, the word
    embeddings; at `"layer"` the input of their decoder layer; at `"module"` the input of their linear module.

    Attributes:
        name: what users call it.
        paper: arXiv number of its paper; empty where there is none.
        level: what it looks at.
        learns: how it learns, or None where it learns nothing.
        adds: whether its gates, of linear modules, add an update of their own (`AddsUpdate`).
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    level: ClassVar[Level]
    learns: ClassVar[Learning | None] = None
    adds: ClassVar[bool] = False

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where the weights differ, and gates stand."""

    @abstractmethod
    def gate(self, site: Site) -> nn.Module | None:
        """Make the gate of one site, or None for the base model alone.

        Raises:
            MethodError: if the method cannot take the adapters that are there.
        """

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Fields of `FitConfig` whose defaults this method's own source changes; a class may have one for all."""
        return {}

    @property
    def reads_prompt(self) -> bool:
        """Whether it has to look at a whole prompt before that is answered."""
        return False

    def keeper(self, site: Site) -> nn.Module | None:
        """Make what a method that weighs tokens keeps for the whole model, to read prompts by; or None."""
        return None

    def prior(self, query: Query, keeper: Any) -> Float[Tensor, " adapters"]:
        """What a whole prompt says of each adapter, for gates that weigh its tokens; minus infinity excludes one.

        Raises:
            NotImplementedError: of methods that need none.
        """
        raise NotImplementedError(f"The method {self.name!r} has nothing to say of whole prompts.")

    @property
    def mixing(self) -> Mixing:
        """What is mixed: the adapters' outputs, or their A and B each, which multiplies out to cross terms."""
        return "outputs"

    def starts(self, adapters: Sequence[str]) -> Mapping[str, Sequence[float]]:
        """Fusion weights that training may start at, by name: at those of the lowest loss on the examples; or none."""
        return {}

    def start_weights(self, adapters: Sequence[str], best: str | None) -> list[float] | None:
        """The fusion weights at which training starts, given the best of `starts`; None where gates start as made.

        A method that gives some has gates with `start_at(weights)`.
        """
        return None

    def check(self, adapters: Sequence[str]) -> None:  # noqa: B027
        """Check the parameters against the adapters that are to be fused.

        Raises:
            MethodError: if a parameter names an unknown adapter, or has the wrong length.
        """

    def parameters(self) -> dict[str, Any]:
        """The parameters as JSON values; `type(self)(**parameters)` is an equal method."""
        return asdict(self)


@runtime_checkable
class StartsAt(Protocol):
    """A gate that can be set to constant weights."""

    def start_at(self, weights: Sequence[float]) -> None:
        """Forget what was learned and give exactly these fusion weights for every input."""


class LowRank(NamedTuple):
    r"""An update of a linear that is the same for every input: $x \mapsto U\, C\, D\, x$.

    Attributes:
        down: D, in the base's precision.
        core: C, in the precision of gates.
        up: U, in the base's precision.
    """

    down: Float[Tensor, "rank_in in_features"]
    core: Float[Tensor, "rank_out rank_in"]
    up: Float[Tensor, "out_features rank_out"]


@runtime_checkable
class AddsUpdate(Protocol):
    """A gate of one linear that, beside its weights, adds an update of its own; only `core` may learn.

    Its matrices are two-dimensional buffers, which are brought into the base's precision.
    """

    def factors(self) -> LowRank:
        """The update."""


@runtime_checkable
class KnownWeights(Protocol):
    """A gate whose weights depend on no input: adapters that have none anywhere are left out of the pass.

    Those of a gate without parameters stay as they are.
    """

    def known_weights(self) -> Float[Tensor, "*requests adapters"]:
        """What the gate gives for any input, on the device where it has it."""


@runtime_checkable
class FewWeights(Protocol):
    """A gate that gives each position a few weights and all other adapters exactly zero: those few are computed."""

    @property
    def most(self) -> int:
        """How many adapters have a weight at one position, at most."""


@runtime_checkable
class Searched(Protocol):
    """A method whose weights, one for each adapter, are searched without gradients.

    Attributes:
        budget: evaluations of the loss.
        bound: weights stay within plus and minus this.
        regularization: factor of the mean absolute weight in the objective.
    """

    budget: int
    bound: float
    regularization: float


@runtime_checkable
class LearnsAlone(Protocol):
    """A gate that learns with one adapter at a time.

    Attributes:
        expert: position of that adapter while it is trained, else None.
    """

    expert: int | None


@runtime_checkable
class LearnsAmong(Protocol):
    """A gate that may learn among some of the adapters, as if there were no others.

    Attributes:
        among: which adapters those are, while it learns, `[adapters]`; else None.
    """

    among: Bool[Tensor, " adapters"] | None


@runtime_checkable
class Drops(Protocol):
    """A method whose gates learn among adapters that change from forward to forward.

    Attributes:
        drop: the probability with which an adapter is left out of one.
    """

    drop: float


@runtime_checkable
class Embeds(Protocol):
    """A method that embeds texts."""

    def embed(self, query: Query, gate: Any) -> Float[Tensor, " hidden"]:
        """The embedding of a text, given what the method's `gate` made for the whole model, or its `keeper`."""


@runtime_checkable
class KeepsSamples(Protocol):
    """A gate that is made of the embeddings of each adapter's samples."""

    def set_samples(self, embeddings: Sequence[Float[Tensor, "_samples hidden"]]) -> None:
        """Take over the embeddings of each adapter's samples, in the adapters' order."""


@runtime_checkable
class JoinsLater(KeepsSamples, Protocol):
    """Such a gate, to which an adapter may come without the samples of the others."""

    def kept_samples(self) -> Sequence[Float[Tensor, "_samples hidden"] | None]:
        """For each adapter embeddings that stand for its samples to `set_samples`; None where there were none yet."""


Measure = Callable[[Float[Tensor, "tokens hidden"], Float[Tensor, "passes tokens hidden"]], Float[Tensor, " passes"]]
"""Compares one layer's states with the base alone with those with each adapter alone."""


class Query(Protocol):
    """One request's prompt, and what the model makes of it before it answers.

    Layer l means the output of decoder layer l. Every request is read by itself, without padding, so that its weights
    are the same whatever else is in the batch.

    Attributes:
        input_ids: the prompt, `[seq]`.
        layers: number of decoder layers.
        adapters: names of the adapters, in order.
        vocabulary: number of logits of the model's head.
    """

    input_ids: Int[Tensor, " seq"]
    layers: int
    adapters: tuple[str, ...]
    vocabulary: int

    @property
    def text(self) -> str:
        """The prompt as text."""

    def compare(self, measure: Measure, tokens: Literal["last", "all"]) -> Float[Tensor, "layers adapters"]:
        """Pass the prompt through the base alone and through it with each adapter alone, and compare every layer."""

    def logits(self, states: Float[Tensor, "*rows hidden"], *, norm: bool) -> Float[Tensor, "*rows vocabulary"]:
        """The logit lens: the model's head on states of any layer, after its final norm or not; in float64."""

    def layer_output(self, layer: int) -> Float[Tensor, "seq hidden"]:
        """The output of a decoder layer (-1 is the last) in a pass through the base alone."""

    def module_input(self, name: str) -> Float[Tensor, "seq features"]:
        """The input of a linear (`layers.3.self_attn.q_proj`) in a pass through the base alone."""


class QueryGate(nn.Module):
    """What a query-level method keeps; it gives no weights by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            "The method in use weighs a whole prompt before it is answered, and a bare forward does not say what the "
            "prompt is. Call `generate`, or give `fusion_weights=model.weigh(prompt_ids)`."
        )


@dataclass(frozen=True)
class QueryMethod(Method):
    """A method that looks at the whole prompt before generation; the weights stay with the request until its end."""

    level: ClassVar[Level] = "query"

    @property
    def reads_prompt(self) -> bool:
        """That is all it looks at."""
        return True

    def gate(self, site: Site) -> QueryGate:
        """Make what the method keeps, for the whole model."""
        return QueryGate()

    @abstractmethod
    def weigh(self, query: Query, gate: Any) -> Float[Tensor, "layers adapters"] | Float[Tensor, " adapters"]:
        """The fusion weights of one request, given what `gate` made."""


@dataclass(frozen=True)
class ScoredMethod(QueryMethod):
    """A query-level method that scores each adapter, the higher the better it fits, and weighs by the scores.

    Who picks a few of many adapters compares their scores, and weighs those that are left by theirs alone.
    """

    @property
    @abstractmethod
    def measure(self) -> str:
        """What a score is, for people, with its unit where it has one."""

    @abstractmethod
    def scores(self, query: Query, gate: Any) -> Float[Tensor, "layers adapters"] | Float[Tensor, " adapters"]:
        """How well each adapter fits a prompt, given what `gate` made; where layers differ, their mean says it."""

    @abstractmethod
    def weights_of(
        self, scores: Float[Tensor, "layers adapters"] | Float[Tensor, " adapters"]
    ) -> Float[Tensor, "layers adapters"] | Float[Tensor, " adapters"]:
        """The fusion weights of adapters with these scores; those of some of them are as if there were no others."""

    def weigh(self, query: Query, gate: Any) -> Float[Tensor, "layers adapters"] | Float[Tensor, " adapters"]:
        """The fusion weights of one request, by its scores."""
        return self.weights_of(self.scores(query, gate))
