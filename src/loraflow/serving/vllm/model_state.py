"""Weights of requests on vLLM's V2 model runner, by its own hook: a model may bring the class of its state.

V2 runs on GPUs only, and this has not been run on one: what is tested is the bookkeeping, on vLLM's own classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from loraflow.serving.vllm.request_table import RequestTable
from loraflow.serving.vllm.request_weights import KEY
from loraflow.serving.vllm.seam import default_model_state

DEFAULT: Any = default_model_state()


class RequestingState(DEFAULT):
    """A model's state that notes what requests bring, and before each forward which tokens are whose."""

    @property
    def _table(self) -> RequestTable:
        return self.model.loraflow_requests

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note what a new request brings; its slot is its own until it ends."""
        super().add_request(req_index, new_req_data)
        self._table.put(req_index, (new_req_data.sampling_params.extra_args or {}).get(KEY))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Note which tokens are whose."""
        starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
        places = input_batch.idx_mapping[: input_batch.num_reqs]
        self._table.locate(starts, input_batch.num_tokens_after_padding, places)
        return super().prepare_inputs(input_batch, req_states)


class StatefulModel(nn.Module):
    """Mixed into the class of a model of vLLM: brings the class of its state."""

    @staticmethod
    def get_model_state_cls() -> type[RequestingState]:
        """What vLLM asks a model for."""
        return RequestingState
