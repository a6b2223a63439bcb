"""The engine: each of many requests is answered as it is alone."""

from __future__ import annotations

import random
import re
import threading
import time

import pytest
import torch

from loraflow import FusedModel, LoraFlow, Static
from loraflow.core.group import InputGroup
from loraflow.demo.tasks import load_task
from loraflow.demo.world import adapter_paths, base_path
from loraflow.errors import ArchitectureError, LoraflowError
from loraflow.methods import Arrow, Logo, QaFlora
from loraflow.serving.batching import sample
from loraflow.serving.config import EngineLimits
from loraflow.serving.engine import Engine
from loraflow.serving.jobs import Failure, Sampling, Weigher
from tests.serving.worlds import DEADLINE_S, alone, job, learned, running, send, tiny_fusion, wait_for, weigher_of
from tests.tiny import random_adapter, random_ids, tiny_model

SMALL = EngineLimits(requests=8, batch_tokens=24, cache_tokens=1024, page_tokens=16)
# Nothing learned here; the base, one adapter, the average, hand-set weights (by layer too), and methods that read.
PLAIN = [
    "base",
    "b",
    "average",
    {"a": 0.7, "c": -1.2},
    Static([{"a": 0.5}, {"b": -1.0, "c": 0.3}, {"a": 1.0, "b": 1.0}]),
    Arrow(2),
    QaFlora(),
    Logo(),
]
GRANULARITIES = ["layer", "module", "step"]


def prompts(count, longest=45):
    """Prompts of one token to nearly three pages."""
    lengths = [1 + (7 * index) % longest for index in range(count)]
    return [random_ids(1, length, seed=50 + index)[0].tolist() for index, length in enumerate(lengths)]


# ---- Answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mistral"])
def test_concurrent_requests_are_answered_as_alone(architecture):
    model = tiny_fusion(architecture)
    cases = []
    for seed, granularity in enumerate(GRANULARITIES):
        weigher = learned(model, LoraFlow(granularity), seed)
        cases += [(prompt, weigher, alone(model, prompt)) for prompt in prompts(4)]
    for prompt, method in zip(prompts(2 * len(PLAIN)), PLAIN * 2, strict=True):
        cases.append((prompt, weigher_of(model, method, prompt), alone(model, prompt, method)))
    random.Random(0).shuffle(cases)
    with running(model, SMALL) as engine:
        heard = [send(engine, job(prompt, weigher)) for prompt, weigher, _ in cases]
        for listener, (_, weigher, expected) in zip(heard, cases, strict=True):
            assert listener.ids() == expected, weigher.method
    assert len({tuple(expected) for _, _, expected in cases}) > len(cases) // 2


def test_a_step_computes_what_its_requests_use(monkeypatch):
    model, seen = tiny_fusion(), set()
    cases = [(prompt, method, alone(model, prompt, method)) for prompt in prompts(3) for method in ("b", {"a": 0.7})]
    reading = InputGroup.reading
    monkeypatch.setattr(InputGroup, "reading", lambda group, active: seen.add(active) or reading(group, active))
    with running(model, SMALL) as engine:
        heard = [send(engine, job(prompt, weigher_of(model, method, prompt))) for prompt, method, _ in cases]
        assert [listener.ids() for listener in heard] == [expected for *_, expected in cases]
    assert (0, 1) in seen
    assert seen <= {(0,), (1,), (0, 1)}


@pytest.mark.parametrize("own", [*GRANULARITIES, "given"])
def test_the_base_beside_one_fusion_stays_the_base(own):
    model = tiny_fusion()
    prompt = prompts(4)[3]
    expected = {"base": alone(model, prompt, "base")}
    if own == "given":
        weigher, expected["own"] = (
            Weigher(weights=torch.full((3, 3), 0.5)),
            alone(model, prompt, dict.fromkeys("abc", 0.5)),
        )
    else:
        weigher = learned(model, LoraFlow(own), 1)
        expected["own"] = alone(model, prompt)
    assert expected["own"] != expected["base"]
    with running(model, SMALL) as engine:
        heard = [send(engine, job(prompt, one)) for one in (weigher, Weigher(), weigher, Weigher())]
        assert [listener.ids() for listener in heard] == [expected["own"], expected["base"]] * 2


@pytest.mark.parametrize("seed", range(3))
def test_requests_join_and_leave_in_any_order(seed):
    rng = random.Random(seed)
    model = tiny_fusion()
    weigher = learned(model, LoraFlow("layer"), 3)
    cases = [(prompt, rng.randint(1, 12)) for prompt in prompts(12)]
    expected = [alone(model, prompt, new=new) for prompt, new in cases]
    rng.shuffle(order := list(range(len(cases))))
    with running(model, SMALL) as engine:
        heard, started = {}, threading.Event()
        for index in order:
            prompt, new = cases[index]
            heard[index] = send(engine, job(prompt, weigher, new))
            if rng.random() < 0.5:
                # Let some of them be answered before the next comes.
                started.wait(rng.random() / 50)
        for index, answered in enumerate(expected):
            assert heard[index].ids() == answered


def test_a_small_cache_queues_and_resumes_requests():
    model = tiny_fusion()
    cases = [(prompt, method) for prompt in prompts(6, 30) for method in ("base", "a", {"a": 0.7, "c": -1.2})]
    expected = [alone(model, prompt, method, new=30) for prompt, method in cases]
    # All together want some 800 tokens, and grow while they run: some are put off with half an answer given.
    with running(model, EngineLimits(requests=8, batch_tokens=24, cache_tokens=96, page_tokens=16)) as engine:
        heard = [send(engine, job(p, weigher_of(model, method, p), new=30)) for p, method in cases]
        assert [listener.ids() for listener in heard] == expected
        assert engine.running == 0


def test_what_waits_is_told_from_what_runs():
    model = tiny_fusion()
    with running(model, EngineLimits(requests=1, batch_tokens=24, cache_tokens=1024, page_tokens=16)) as engine:
        heard = [send(engine, job(prompt, new=200)) for prompt in prompts(3)]
        wait_for(lambda: engine.batched == 1)
        assert engine.running > 1
        for listener in heard:
            listener.tokens()
        assert (engine.running, engine.batched) == (0, 0)


@pytest.mark.parametrize("page_tokens", [16, 5])
def test_a_request_may_fill_the_whole_cache(page_tokens):
    model = tiny_fusion()
    prompt = prompts(3, 45)[2] * 2
    limits = EngineLimits(requests=2, batch_tokens=512, cache_tokens=len(prompt) + 10, page_tokens=page_tokens)
    with running(model, limits) as engine:
        assert send(engine, job(prompt, new=10)).ids() == alone(model, prompt, "base", new=10)


@pytest.fixture(scope="module")
def world():
    return FusedModel.from_adapters(base_path(), adapter_paths(), "average")


def test_the_small_world_is_answered_as_alone(world):
    questions = [load_task(name).test[index].prompt for name in ("zh-math", "es-code", "ru-math") for index in (0, 1)]
    encoded = [world.encode([question])["input_ids"][0].tolist() for question in questions]
    # Longer than two pages, and than a step.
    encoded.append(sum((ids[1:] for ids in encoded[:4]), encoded[0][:1]))
    cases = []
    for seed, granularity in enumerate(GRANULARITIES):
        weigher = learned(world, LoraFlow(granularity), seed)
        cases += [(ids, weigher, alone(world, ids, new=24)) for ids in encoded[seed::2]]
    methods = ["base", "math", "average", {"zh-chat": 0.6, "math": 0.9}, "qa-flora", "logo", "arrow"]
    for ids, method in zip(encoded, methods, strict=True):
        cases.append((ids, weigher_of(world, method, ids), alone(world, ids, method, new=24)))
    random.Random(1).shuffle(cases)
    with running(world, EngineLimits(requests=16, batch_tokens=48, cache_tokens=4096, page_tokens=16)) as engine:
        heard = [send(engine, job(ids, weigher, new=24)) for ids, weigher, _ in cases]
        for listener, (_, weigher, expected) in zip(heard, cases, strict=True):
            assert listener.ids() == expected, weigher.method


# ---- Weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tokens_come_with_the_weights_that_made_them(granularity):
    model = tiny_fusion()
    weigher = learned(model, LoraFlow(granularity), 7)
    prompt = prompts(6)[5]
    given = Weigher(weights=torch.tensor([[0.1, 0.2, 0.3], [-1.0, 0.0, 2.0], [0.5, 0.5, 0.5]]))
    with running(model, SMALL) as engine:
        heard = send(engine, job(prompt, weigher, weights=True))
        beside = send(engine, job(prompt, given, weights=True))
        without = send(engine, job(prompt, weigher))
        bare = send(engine, job(prompt, weights=True))
        answered = heard.tokens()
        assert all(torch.equal(token.weights, given.weights) for token in beside.tokens())
        assert all(token.weights is None for token in without.tokens())
        assert all(not token.weights.any() for token in bare.tokens())
    ids = torch.tensor([prompt + [token.id for token in answered]])
    trace = model.trace(ids, prompt_length=len(prompt))
    for index, token in enumerate(answered):
        torch.testing.assert_close(token.weights, trace.weights[0, len(prompt) - 1 + index], rtol=1e-4, atol=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_whatever_else_runs():
    model = tiny_fusion()
    weigher = learned(model, LoraFlow("layer"), 3)
    prompt = prompts(4)[3]

    def drawn(engine, **settings):
        return send(engine, job(prompt, weigher, 12, temperature=1.0, **settings))

    with running(model, SMALL) as engine:
        first = drawn(engine, seed=5).ids()
        noise = [send(engine, job(p, temperature=1.5, seed=i)) for i, p in enumerate(prompts(5))]
        crowded = drawn(engine, seed=5)
        others = [drawn(engine, seed=seed).ids() for seed in (6, -6, 2**62)]
        unseeded = [drawn(engine).ids() for _ in range(4)]
        assert crowded.ids() == first
        assert all(other != first for other in others)
        assert len({tuple(ids) for ids in unseeded}) > 1
        for listener in noise:
            listener.tokens()


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        drawn = torch.tensor([int(sample(logits, Sampling(**settings), generator)) for _ in range(3000)])
        return torch.bincount(drawn, minlength=4) / len(drawn)

    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(dim=-1)
        assert (shares(temperature=temperature) - expected).abs().max() < 0.04
    kept = logits[:2].softmax(dim=-1)
    # 0.64 + 0.24 < 0.9: three tokens are needed; for 0.7 two, and for 0.6 one.
    assert (shares(temperature=1.0, top_p=0.7)[:2] - kept).abs().max() < 0.04
    assert shares(temperature=1.0, top_p=0.7)[2:].sum() == 0
    assert shares(temperature=1.0, top_p=0.9)[2] > 0
    assert shares(temperature=1.0, top_p=0.9)[3] == 0
    assert shares(temperature=1.0, top_p=0.6)[0] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_the_coldest_draws_are_greedy(temperature):
    logits = torch.tensor([3.0, 30.0, 1.0])
    for top_p in (1.0, 0.5):
        assert int(sample(logits, Sampling(temperature, top_p), torch.Generator().manual_seed(1))) == 1


def test_logprobs_are_those_of_the_model():
    model = tiny_fusion()
    weigher = learned(model, LoraFlow("layer"), 3)
    prompt = prompts(4)[3]
    with running(model, SMALL) as engine:
        several = {
            count: send(engine, job(prompt, weigher, logprobs=count, temperature=temperature, seed=1))
            for count, temperature in ((0, 0.0), (3, 0.7), (1000, 0.0))
        }
        several = {count: listener.tokens() for count, listener in several.items()}
        assert all(token.logprob is None and token.top == () for token in send(engine, job(prompt)).tokens())
    for count, tokens in several.items():
        ids = torch.tensor([prompt + [token.id for token in tokens]])
        logs = model(ids).logits[0].log_softmax(dim=-1)[len(prompt) - 1 :]
        for row, token in zip(logs, tokens, strict=False):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            best = row.topk(min(count, len(row))) if count else None
            assert len(token.top) == min(count, len(row))
            if best is not None:
                assert [one for one, _ in token.top[:3]] == best.indices[:3].tolist()
                assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_answers_end_at_an_end_token_or_the_limit():
    model = tiny_fusion()
    prompt = prompts(4)[3]
    free = alone(model, prompt, "base", new=8)
    with running(model, SMALL) as engine:
        whole = job(prompt, new=8)
        ended = job(prompt, new=8)
        ended.ends = (free[3],)
        endless = job(prompt, new=8)
        endless.ends = ()
        tokens = [send(engine, one).tokens() for one in (whole, ended, endless)]
    assert [token.id for token in tokens[1]] == free[: free.index(free[3]) + 1]
    assert [each[-1].finish for each in tokens] == ["stop" if 2 in free else "length", "stop", "length"]
    assert all(token.finish is None for each in tokens for token in each[:-1])
    assert len(tokens[2]) == 8


# ---- Leaving, failing, closing -------------------------------------------------------------------------------------


def test_cancelled_requests_disturb_nobody():
    model = tiny_fusion()
    weigher = learned(model, LoraFlow("layer"), 3)
    kept = prompts(6)
    expected = [alone(model, prompt, new=20) for prompt in kept]
    rng = random.Random(4)
    with running(model, SMALL) as engine:
        heard, leaving = [], []
        for prompt in kept:
            leaving += [job(prompt, weigher, 60, weights=True, logprobs=1) for _ in range(2)]
            for one in leaving[-2:]:
                engine.submit(one)
            heard.append(send(engine, job(prompt, weigher, 20, weights=True)))
            time.sleep(rng.random() / 50)
            engine.cancel(leaving.pop(rng.randrange(len(leaving))).id)
        for one in leaving:
            engine.cancel(one.id)
        assert [listener.ids() for listener in heard] == expected
        counts = [len(one.listener.heard) for one in leaving]
        engine.cancel("nobody")
        assert engine.running == 0
        assert send(engine, job(kept[0], weigher, 20)).ids() == expected[0]
        assert [len(one.listener.heard) for one in leaving] == counts


def test_a_request_that_leaves_in_the_middle_of_a_step_disturbs_nobody(monkeypatch):
    model = tiny_fusion()
    weigher = learned(model, LoraFlow("layer"), 3)
    prompt = prompts(4)[3]
    expected = alone(model, prompt)
    with running(model, SMALL) as engine:
        leaving = job(prompt, weigher, weights=True, logprobs=1)
        real = model.base_model.lm_head.forward

        def leave(x):
            engine.cancel(leaving.id)
            return real(x)

        monkeypatch.setattr(model.base_model.lm_head, "forward", leave)
        staying = job(prompt, weigher, weights=True)
        engine.submit(leaving)
        assert send(engine, staying).ids() == expected
        assert leaving.listener.heard == []
        assert engine.failure is None


@pytest.mark.parametrize("weight", [1e30, -1e38, 1e6])
def test_absurd_weights_hurt_only_the_request_that_asks_for_them(weight):
    model = tiny_fusion()
    prompt = prompts(4)[3]
    expected = alone(model, prompt, {"a": 0.7, "c": -1.2}, new=20)
    with running(model, SMALL) as engine:
        good = [send(engine, job(prompt, weigher_of(model, {"a": 0.7, "c": -1.2}, prompt), 20)) for _ in range(2)]
        absurd = [
            job(prompt, Weigher(weights=torch.full((3, 3), weight)), temperature=temperature, logprobs=2)
            for temperature in (0.0, 1.0)
        ]
        for one in absurd:
            engine.submit(one)
        good.append(send(engine, job(prompt, weigher_of(model, {"a": 0.7, "c": -1.2}, prompt), 20)))
        assert [listener.ids() for listener in good] == [expected] * 3
        for one in absurd:
            assert one.listener.ended.wait(DEADLINE_S)
            last = one.listener.heard[-1]
            if isinstance(last, Failure):
                assert re.search(r"no finite numbers.*smaller weights", last.message)
        assert engine.running == 0
        # The pages of the failed ones are used again.
        again = [send(engine, job(prompt, weigher_of(model, {"a": 0.7, "c": -1.2}, prompt), 20)) for _ in range(8)]
        assert [listener.ids() for listener in again] == [expected] * 8


def test_a_failing_step_is_told_to_every_listener(monkeypatch):
    model = tiny_fusion()
    engine = Engine(model, SMALL)
    try:
        listeners = [send(engine, job(prompt, new=500)) for prompt in prompts(10)]

        def fail(*_):
            raise RuntimeError("the head has fallen off")

        monkeypatch.setattr(model.base_model.lm_head, "forward", fail)
        for listener in listeners:
            assert listener.ended.wait(DEADLINE_S)
            assert listener.heard[-1] == Failure("the head has fallen off")
        deadline = time.monotonic() + DEADLINE_S
        while engine.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.failure == "RuntimeError: the head has fallen off"
        assert engine.running == 0
        with pytest.raises(LoraflowError, match=r"The engine has ended: RuntimeError: the head has fallen off\."):
            engine.submit(job([5]))
    finally:
        engine.close()


def test_closing_finishes_what_runs_or_fails_it():
    model = tiny_fusion()
    prompt = prompts(4)[3]
    engine = Engine(model, SMALL)
    listeners = [send(engine, job(prompt, new=20)) for _ in range(12)]
    engine.close()
    assert [listener.ids() for listener in listeners] == [alone(model, prompt, "base", new=20)] * 12
    with pytest.raises(LoraflowError, match=r"The engine has ended: it was closed\."):
        engine.submit(job(prompt))
    engine.close()

    for options in ({"finish": False}, {"finish": True, "timeout_s": 0.01}):
        engine = Engine(model, SMALL)
        listeners = [send(engine, job(prompt, new=900)) for _ in range(12)]
        for listener in listeners:
            listener.ended.wait(0.01)
        engine.close(**options)
        failures = [listener.heard[-1] for listener in listeners if listener.ended.wait(DEADLINE_S)]
        assert len(failures) == 12
        assert failures.count(Failure("The engine was closed before this answer was finished.")) >= 11
        assert engine.running == 0


def test_the_model_can_be_used_while_the_engine_runs():
    model = tiny_fusion()
    prompt = prompts(4)[3]
    expected = alone(model, prompt, "a")
    with running(model, SMALL) as engine:
        long = send(engine, job(prompt, new=200))
        for _ in range(3):
            assert alone(model, prompt, "a") == expected
        with model.attachment.turn():
            assert model.base_model.config._attn_implementation == "sdpa"
        assert long.ids() == alone(model, prompt, "base", new=200)


def test_requests_that_were_put_aside_go_on_when_others_are_given_up():
    model = tiny_fusion()
    limits = EngineLimits(requests=8, batch_tokens=64, cache_tokens=128, page_tokens=16)
    with running(model, limits) as engine:
        # Two answers that do not fit into the cache together.
        long = [job([3 + i * 7 % 50 for i in range(count)], new=80) for count in (30, 31)]
        for one in long:
            one.ends = ()
            send(engine, one)
        wait_for(lambda: engine._manager.batch_processor is not None)
        scheduler = engine._manager.batch_processor.scheduler
        wait_for(lambda: scheduler.block_new_requests)
        for name in list(scheduler.active_requests):
            engine.cancel(name)
        for one in long:
            if one.id in engine._jobs:
                assert len(one.listener.tokens()) == 80
        assert len(send(engine, job([5, 6], new=2)).tokens()) > 0


# ---- What cannot be ------------------------------------------------------------------------------------------------


def test_a_base_that_adds_to_its_mask_is_refused_at_the_start():
    base = tiny_model("falcon")
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a")}, "average")
    with pytest.raises(ArchitectureError, match=r"FalconForCausalLM cannot be answered in .* Call `generate`"):
        Engine(model, SMALL)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"requests": 0}, "`requests` (=0) must be at least 1."),
        ({"batch_tokens": -3}, "`batch_tokens` (=-3) must be at least 1."),
        ({"cache_tokens": 0}, "`cache_tokens` (=0) must be at least 1."),
        ({"page_tokens": 0}, "`page_tokens` (=0) must be at least 1."),
        ({"cache_tokens": 63}, "`cache_tokens` (=63) must be at least `page_tokens` (=64)."),
    ],
)
def test_limits_are_checked(limits, message):
    with pytest.raises(LoraflowError, match=re.escape(message)):
        EngineLimits(**limits)


def test_eager_attention_is_refused():
    base = tiny_model()
    base.set_attn_implementation("eager")
    model = FusedModel.from_adapters(base, {"a": tiny_fusion().adapters[0]}, "average")
    with pytest.raises(LoraflowError, match=r"Continuous batching changes eager attention for everybody\. Load"):
        Engine(model)


def test_linears_that_read_the_cache_are_refused():
    base = tiny_model("deepseek_v3")
    base.set_attn_implementation("sdpa")
    model = FusedModel.from_adapters(base, {"a": random_adapter(base, "a", ["kv_b_proj"])}, "average")
    with pytest.raises(LoraflowError, match="Linears of DeepseekV3ForCausalLM read all cached positions"):
        Engine(model, SMALL)


def test_requests_that_can_never_be_answered_are_refused():
    with running(tiny_fusion(), EngineLimits(requests=2, batch_tokens=8, cache_tokens=32, page_tokens=16)) as engine:
        with pytest.raises(LoraflowError, match=re.escape("The prompt has no tokens. Give at least one.")):
            engine.submit(job([]))
        message = "The prompt (30 tokens) and its answer (up to 3) do not fit the cache (32 tokens)."
        with pytest.raises(LoraflowError, match=re.escape(message)):
            engine.submit(job([5] * 30, new=3))
        assert engine.running == 0
        assert len(send(engine, job([5] * 29, new=3)).tokens()) == 3
