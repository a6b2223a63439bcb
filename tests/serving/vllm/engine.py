"""Engines of vLLM, one after the other in a process of their own: `python engine.py JOB RESULTS`.

A job is a list of engines: how each is started, and what it is asked, call by call. What comes out is the token ids and
the number of cached prompt tokens of each answer, on request the likeliest tokens after the prompt, or the error that
kept the engine from starting.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

DEFAULTS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.15,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "disable_log_stats": True,
}


def answer(engine: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to one call's prompts."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    extras = call.get("extra_args") or [None] * len(call["prompts"])
    greedy = {"temperature": 0, "max_tokens": call["tokens"], "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**greedy, extra_args=e, logprobs=call.get("logprobs")) for e in extras]
    prompts = [{"prompt_token_ids": prompt} for prompt in call["prompts"]]
    # vLLM keeps adapters by their number.
    lora = call.get("lora") and LoRARequest(call["lora"], zlib.crc32(call["lora"].encode()), call["lora"])
    try:
        outputs = engine.generate(prompts, params, use_tqdm=False, lora_request=lora)
    except VLLMValidationError as error:
        return [{"refused": str(error)}]
    return [
        {"ids": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens, "first": _first(o.outputs[0])}
        for o in outputs
    ]


def _first(output: Any) -> dict[int, float]:
    """The likeliest tokens after the prompt, with their log-probabilities."""
    return {token: found.logprob for token, found in (output.logprobs or [{}])[0].items()}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start one engine and ask it."""
    from vllm import LLM

    try:
        engine = LLM(**{**DEFAULTS, **job["engine"]})
    except BaseException:
        return {"error": traceback.format_exc()}
    answers = [answer(engine, call) for call in job["calls"]]
    del engine
    return {"answers": answers}


def main(jobs: Path, results: Path) -> None:
    """Run all jobs."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    found = []
    for job in json.loads(jobs.read_text()):
        found.append(run(job))
        results.write_text(json.dumps(found))
        gc.collect()
        destroy_model_parallel()
        destroy_distributed_environment()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
