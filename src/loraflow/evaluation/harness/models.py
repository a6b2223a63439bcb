"""A fusion, and stored responses, as models of lm-evaluation-harness."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from loraflow.answers import generate_answers, pad_prompts, require_tokenizer
from loraflow.core.fusion import Fusion
from loraflow.errors import DataError, LoraflowError, MethodError
from loraflow.methods import QueryMethod

Progress = Callable[[int, int], object]
"""Called with the number of requests answered so far, and of all."""


class LMClasses(NamedTuple):
    """Classes that exist only where lm-eval is installed."""

    FusionLM: Any
    StoredLM: Any


@functools.cache
def lm_classes() -> LMClasses:
    """The classes by which lm-eval sees a fusion, and stored responses.

    Raises:
        LoraflowError: if lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise LoraflowError(
            f"Tasks need lm-evaluation-harness ({error}): pip install 'loraflow[evaluation]'"
        ) from error
    return LMClasses(
        type("FusionLM", (_FusionLM, HFLM), {"__doc__": _FusionLM.__doc__}), type("StoredLM", (_StoredLM, LM), {})
    )


class _TokenIds:
    """For `generate_answers`: the conversations are token ids already."""

    @staticmethod
    def prompt_ids(tokenizer: Any, conversation: Any) -> list[int]:
        return list(conversation)


class _Counter:
    """lm-eval's hook for answers that a cache may keep; here it counts them."""

    def __init__(self, on_progress: Progress) -> None:
        self.on_progress = on_progress
        self.done = self.total = 0

    def start(self, total: int) -> None:
        self.done, self.total = 0, total

    def add_partial(self, kind: str, request: Any, response: Any) -> None:
        self.done += 1
        self.on_progress(self.done, self.total)


# What lm-eval's classes have, which stand behind these in the classes that are made of both.
_LM: Any = object


class _FusionLM(_LM):
    """A fusion as a model of lm-eval's.

    Prompts have the token ids, and are answered in the batches, of the fusion's other runs. Methods that look at
    whole prompts see a request's context as the prompt.
    """

    def __init__(
        self,
        model: Fusion,
        *,
        chat: bool = False,
        batch_size: int = 16,
        on_progress: Progress = lambda done, total: None,
    ) -> None:
        # A chat template writes the start token itself.
        written = chat and model.prompt.chat_template is not None
        self.fusion = model
        self.tokens: dict[int | None, int] = defaultdict(int)
        self.shortened = 0
        super().__init__(
            pretrained=model,
            # A copy, for lm-eval gives it a padding token.
            tokenizer=copy.deepcopy(require_tokenizer(model.tokenizer)),
            batch_size=batch_size,
            add_bos_token=False if written else None,
        )
        self.cache_hook = _Counter(on_progress)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the fusion's prompt format; one that ends with the start of the answer is continued."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        return self.fusion.prompt.prompt_text(self.tokenizer, turns) + begun

    def get_model_info(self) -> dict[str, Any]:
        """Nothing; lm-eval would look the model up on the Hub."""
        return {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer requests, those with the same settings together."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            groups[repr(request.args[1])].append(row)
        self._start(requests)
        texts = [""] * len(requests)
        for rows in groups.values():
            for row, text in zip(rows, self._generate([requests[row] for row in rows]), strict=True):
                texts[row] = text
        return texts

    def _generate(self, requests: list[Any]) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        options = dict(normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks))
        until, longest = options.pop("until", None) or [], options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options.pop("temperature", None)
        conversations: list[Any] = [self._fitted(request.args[0], longest) for request in requests]
        answers = generate_answers(
            self.fusion,
            conversations,
            tokenizer=self.tokenizer,
            prompt=cast(Any, _TokenIds),
            max_new_tokens=longest,
            endings=self.fusion.endings,
            batch_size=self.batch_size,
            stop=[stop for stop in ([until] if isinstance(until, str) else until) if stop],
            on_batch=self._count,
            **options,
        )
        for request, answer in zip(requests, answers, strict=True):
            self.tokens[request.doc_id] += answer.tokens
            if not isinstance(self.cache_hook, _Counter):
                self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]

    def _fitted(self, text: str, longest: int) -> list[int]:
        """A prompt's token ids, the last ones if they are too many.

        Raises:
            LoraflowError: if the answer alone is too long.
        """
        room = self.max_length - longest
        if room < 1:
            raise LoraflowError(
                f"The task asks for {longest} new tokens, and the model reads {self.max_length}, prompt included. "
                "Make a task of your own that includes this one and sets a smaller `max_gen_toks`."
            )
        ids: list[int] = self.tok_encode(text)
        self.shortened += len(ids) > room
        return ids[-room:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, and whether it is the greedy one."""
        self._start(requests)
        return cast(list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """How likely whole texts are.

        Raises:
            MethodError: if the method weighs prompts: a whole text has none.
        """
        method = self.fusion.method
        if method.reads_prompt:
            raise MethodError(
                f"The method {method.name!r} weighs each prompt, and a text whose likelihood is wanted has none. "
                "Take a task with questions, or another method."
            )
        self._start(requests)
        return cast(list[float], super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        if not isinstance(self.fusion.method, QueryMethod):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)
        found = []
        for start in range(0, len(requests), self.batch_size):
            found += _weighed_likelihoods(self, requests[start : start + self.batch_size])
        return found

    def _start(self, requests: list[Any]) -> None:
        if isinstance(self.cache_hook, _Counter):
            self.cache_hook.start(len(requests))

    def _count(self, answered: int) -> None:
        if isinstance(self.cache_hook, _Counter):
            for _ in range(answered):
                self.cache_hook.add_partial("generate_until", None, None)


@torch.inference_mode()
def _weighed_likelihoods(lm: Any, requests: list[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-likelihoods of continuations, under the weights that a method gives their contexts.

    Each request is its text, its context's token ids, and its continuation's.
    """
    model = lm.fusion
    weights = model.weigh(
        **pad_prompts([context[-lm.max_length :] for _, context, _ in requests], lm.tokenizer, model.device)
    )
    rows = [(context + continuation)[-(lm.max_length + 1) :][:-1] for _, context, continuation in requests]
    # Padded on the right, where nothing real can see it.
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
    logits = model(ids, fusion_weights=weights).logits
    found = []
    for (text, _, continuation), row, scores in zip(requests, rows, logits, strict=True):
        target = torch.tensor(continuation, device=scores.device)
        logs = scores[len(row) - len(continuation) : len(row)].float().log_softmax(-1)
        likely = logs.gather(1, target[:, None]).sum().item()
        found.append((likely, bool((logs.argmax(-1) == target).all())))
        lm.cache_hook.add_partial("loglikelihood", text, found[-1])
    return found


class _StoredLM(_LM):
    """Stored responses as a model of lm-eval's.

    Requests are known by their problem's position and their own in it, so that prompts may change.
    """

    def __init__(self, responses: list[list[Any]]) -> None:
        super().__init__()
        self.responses = responses

    def _respond(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        given: dict[tuple[int, int], int] = defaultdict(int)
        found = []
        for request in requests:
            key = (request.doc_id, request.idx)
            found.append(self._stored(*key, given[key], request.task_name))
            given[key] += 1
        return found

    def _stored(self, position: int, request: int, repeat: int, task: str) -> Any:
        """One stored response.

        Raises:
            DataError: if the problem had fewer requests, or fewer repeats of them.
        """
        try:
            response = self.responses[position][request][repeat]
        except IndexError as error:
            raise DataError(changed_problem(task, f"at position {position}")) from error
        return tuple(response) if isinstance(response, list) else response

    generate_until = loglikelihood = loglikelihood_rolling = _respond


def changed_problem(task: str, number: object) -> str:
    """The message for stored responses whose problem is no longer what it was."""
    return (
        f"Problem {number} of the task {task!r} is no longer the one that was answered. Restore the data that the "
        "responses are for, or answer it anew."
    )
