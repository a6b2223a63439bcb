r"""LoRA-Flow: a gate gives each token its own weight for each adapter.

$$w = \operatorname{softmax}(W_{gate}\, x / \tau) + b$$

with one gate for the whole model (step), for each decoder layer (layer, the default), or for each linear module
(module). The bias is added after the softmax: weights may be negative and need not sum to one. Gates beyond the paper
(`loraflow.methods.flow_gates`) change what the gate reads, how it scores, or how scores become weights.

Paper: Wang et al. 2024, "LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks",
[arXiv 2402.11455](https://arxiv.org/abs/2402.11455). Cost: one low-rank pass and k(d + 1) values for each gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from loraflow.methods._shared.fitted import FittedOnExamples
from loraflow.methods.base import Learning, Level, Method, Site
from loraflow.methods.checks import check_choice, check_count, check_positive, check_top_k
from loraflow.methods.flow_gates import ACTIVATIONS, INPUTS, SCORERS, FlowGate, GateShape


@dataclass(frozen=True)
class LoraFlow(FittedOnExamples, Method):
    """LoRA-Flow's gates.

    Attributes:
        granularity: one gate for the model ("step"), for each layer ("layer", the paper's choice), or for each linear
            module ("module").
        temperature: divisor of the logits before the softmax. The official code has 1.1 for two of its gates, else 1.
        start: where training starts: "best" (the adapter that alone has the lowest loss on the training examples,
            found when fitting; the paper starts at the task adapter), "average", an adapter's name, or weights by
            adapter name.
        reads: what the gate reads of its input: "raw" (the paper), or "normalized", divided by its root mean square.
        scorer: how it scores adapters: "linear" (the paper), "low-rank", "two-layer", or "attention" over vectors that
            stand for the adapters.
        width: rank, hidden width or width of the attention of those scorers.
        activation: "softmax" (the paper), or "sigmoid", where adapters do not compete.
        top_k: keep only the weights of largest magnitude, and set the others to 0; None keeps all (the paper).
    """

    granularity: Literal["step", "layer", "module"] = "layer"
    temperature: float = 1.0
    start: str | Mapping[str, float] = "best"
    reads: Literal["raw", "normalized"] = "raw"
    scorer: Literal["linear", "low-rank", "two-layer", "attention"] = "linear"
    width: int = 16
    activation: Literal["softmax", "sigmoid"] = "softmax"
    top_k: int | None = None

    name: ClassVar[str] = "lora-flow"
    paper: ClassVar[str] = "2402.11455"
    level: ClassVar[Level] = "token"
    learns: ClassVar[Learning] = "gradient"

    def __post_init__(self) -> None:
        check_choice(self.granularity, ("step", "layer", "module"), "granularity")
        check_choice(self.reads, INPUTS, "reads")
        check_choice(self.scorer, list(SCORERS), "scorer")
        check_choice(self.activation, ACTIVATIONS, "activation")
        check_positive(self.temperature, "temperature")
        check_count(self.width, "width")

    def gate(self, site: Site) -> FlowGate:  # noqa: D102
        shape = GateShape(self.temperature, self.reads == "normalized", self.activation, self.top_k, self.width)
        gate = SCORERS[self.scorer](site, shape)
        # "best" is known only once there are examples; until then the average is the neutral choice.
        gate.start_at(self.start_weights(site.adapters, best=None))
        return gate

    def check(self, adapters: Sequence[str]) -> None:  # noqa: D102
        super().check(adapters)
        check_top_k(self.top_k, adapters)
