"""The whole way of a user, on a real model: make it, train two adapters, then every command of `loraflow`.

    python -m scripts.real.walk [--fresh] [--directory build/real]

What each step finds is printed and checked; the first that finds something wrong ends the walk, and is named. Made once
and kept are the base and the adapters; everything else is done anew. docs/real-models.md shows what came out.
"""

from __future__ import annotations

import argparse
import json
import operator
import shutil
import time
from pathlib import Path

import torch
from peft import PeftModel
from scripts.real import tasks
from scripts.real.adapters import train_adapter
from scripts.real.base import make_base
from scripts.real.encoder import make_encoder, try_encoder
from scripts.real.served import serve, try_server
from scripts.real.steps import check, loraflow, made_once, read_lines, show, step, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTERS = ("json", "spanish")
# Enough for both: the model is small, but it has read the words before.
TRAIN, FIT, DEV, HELD_OUT = 160, 32, 8, 12
LONGEST = 48
# The paper's start (the best adapter) and rate are for hundreds of examples; these few learn more from these.
FITTING = ("--method-option", "start=average", "reads=normalized", "--learning-rate", "0.01")


class Walk:
    """The files of a walk, and what one step leaves to the next."""

    def __init__(self, directory: Path) -> None:
        self.base, self.fusion = directory / "base", directory / "fusion"
        self.encoder = directory / "encoder"
        self.adapters = {name: directory / name for name in ADAPTERS}
        self.output = directory / "output"
        # What the gates learn from was not what the adapters learned from.
        facts = tasks.known(seed=0)
        self.train = facts[:TRAIN]
        self.fit = write_lines(self.output / "fit.jsonl", tasks.examples("fusion", facts[TRAIN : TRAIN + FIT]))
        dev = facts[TRAIN + FIT : TRAIN + FIT + DEV]
        self.dev = write_lines(self.output / "dev.jsonl", tasks.examples("fusion", dev))
        self.facts = tasks.held_out(seed=1)[:HELD_OUT]
        self.held_out = write_lines(self.output / "held-out.jsonl", [{"prompt": fact.prompt} for fact in self.facts])
        self.sources = [
            *("--base", self.base, "--lora-modules"),
            *(f"{name}={path}" for name, path in self.adapters.items()),
        ]
        self.answers: dict[str, list[str]] = {}

    def go(self) -> None:
        """All steps."""
        with step("base: SmolLM2-135M-Instruct from GGUF"):
            made_once(self.base, make_base)
            self.try_base()
        with step("encoder: all-MiniLM-L6-v2 by sentence-transformers"):
            made_once(self.encoder, make_encoder)
            try_encoder(self.encoder)
        for name in ADAPTERS:
            with step(f"adapter {name}: trained with PEFT on {TRAIN} examples"):
                made_once(self.adapters[name], lambda path, name=name: self.train_one(name, path))
        with step("info"):
            self.try_info()
        with step("generate, each adapter alone"):
            self.try_alone()
        with step(f"fit on {FIT} examples of JSON in Spanish"):
            options = ("--data", self.fit, "--dev", self.dev, "--output", self.fusion, "--overwrite")
            show(loraflow("fit", *self.sources, *options, *FITTING))
        with step("generate, the fusion and its average"):
            self.try_fusion()
        with step("trace"):
            self.try_trace()
        with step("export"):
            self.try_export()
        with step("serve, asked by the openai client"), serve(self.fusion) as address:
            answers = {name: self.answers[name][0] for name in (*ADAPTERS, "fusion")}
            try_server(address, self.facts[0].prompt, answers, base="base")

    def try_base(self) -> None:
        """The base answers sensibly and ends its turn: weights, tokenizer, template and end token came over."""
        prompt = "What is the capital of France?"
        answer = self.peft_answers(None, [prompt])[0]
        print(f"   {prompt} -> {answer}")
        check(answer == "The capital of France is Paris.", f"the base answers {prompt!r} with {answer!r}")

    def train_one(self, name: str, directory: Path) -> None:
        """Train an adapter, and keep what plain PEFT answers with it."""
        loss = train_adapter(self.base, tasks.examples(name, self.train), directory)
        print(f"   loss at the end {loss:.4f}")
        answers = self.peft_answers(directory, [fact.prompt for fact in self.facts])
        write_lines(directory / "answers.jsonl", [{"answer": answer} for answer in answers])

    def try_info(self) -> None:
        """Both adapters fit, and are counted."""
        found = loraflow("info", *self.sources)
        show(found)
        for words in ("LlamaForCausalLM, 30 layers, hidden size 576", *ADAPTERS, "gates, layer"):
            check(words in found, f"`loraflow info` does not say {words!r}")

    def try_alone(self) -> None:
        """Each adapter does its own job, answers as with PEFT, and does not do the fusion's."""
        for name in ADAPTERS:
            self.answers[name] = self.ask(*self.sources, "--method", name)
            right = self.score(name, task=name)
            check(right >= 0.5 * HELD_OUT, f"{name} alone gives {right} of {HELD_OUT} right answers")
            peft = [record["answer"] for record in read_lines(self.adapters[name] / "answers.jsonl")]
            check(self.answers[name] == peft, f"{name} answers {self.answers[name]}, and with PEFT {peft}")
            check(self.score_values(name) == 0, f"{name} alone does what the fusion is to do")

    def try_fusion(self) -> None:
        """The fusion writes JSON with Spanish in it, as no adapter alone and no average does."""
        found = {}
        for name, options in {"fusion": (), "average": ("--method", "average")}.items():
            self.answers[name] = self.ask(self.fusion, *options)
            found[name] = self.score_values(name)
        least = 3 * HELD_OUT // 6
        check(
            found["fusion"] >= least, f"the fusion has {found['fusion']} Spanish values, and at least {least} were due"
        )
        check(found["fusion"] > found["average"], f"the average has {found['average']}, no fewer than the fusion")
        # One at a time, streamed, it says what it says in a batch.
        single = loraflow("generate", self.fusion, "--prompt", self.facts[0].prompt, "--max-new-tokens", str(LONGEST))
        show(single)
        check(self.answers["fusion"][0] in single, f"in a batch the answer is {self.answers['fusion'][0]!r}")

    def try_trace(self) -> None:
        """Every token has a weight of each adapter in each layer, in the page too."""
        page, numbers = self.output / "trace.html", self.output / "trace.json"
        options = ("--answer", self.answers["fusion"][0], "--json", numbers, "--html", page)
        show(loraflow("trace", self.fusion, "--prompt", self.facts[0].prompt, *options))
        traced = json.loads(numbers.read_text(encoding="utf-8"))
        check(traced["adapters"] == list(ADAPTERS), f"the trace names {traced['adapters']}")
        weights = torch.tensor(traced["weights"])
        check(weights.shape == (len(traced["tokens"]), 30, 2), f"the trace's weights are {tuple(weights.shape)}")
        check(weights.isfinite().all(), "some weights are not finite")
        check(weights.std(dim=0).max() > 0.01, "the gate weighs all tokens alike")
        check("<html" in page.read_text(encoding="utf-8")[:1000], f"{page} is no page")

    def try_export(self) -> None:
        """The average is one PEFT adapter that answers alike; so are the means of the gates, and their cost is said."""
        exact, means = self.output / "average-adapter", self.output / "means-adapter"
        refusal = loraflow("export", self.fusion, "--output", means, "--overwrite", fails=True)
        check("--mean-weights-on" in refusal, f"the gates' weights vary, and `loraflow export` says {refusal}")
        show(loraflow("export", self.fusion, "--method", "average", "--to", "peft", "--output", exact, "--overwrite"))
        prompts = [fact.prompt for fact in self.facts]
        answers = self.peft_answers(exact, prompts)
        check(answers == self.answers["average"], f"PEFT answers {answers}, and the fusion {self.answers['average']}")
        show(loraflow("export", self.fusion, "--mean-weights-on", self.dev, "--output", means, "--overwrite"))
        self.answers["means"] = self.peft_answers(means, prompts)
        self.score_values("means")

    def ask(self, *arguments: str | Path) -> list[str]:
        """Answers to the held-out prompts by `loraflow generate`."""
        path = self.output / "answers.jsonl"
        loraflow("generate", *arguments, "--data", self.held_out, "--output", path, "--max-new-tokens", str(LONGEST))
        return [record["answer_text"] for record in read_lines(path)]

    def score(self, name: str, task: str) -> int:
        """How many answers of `name` are exactly those of a task, with the first of them."""
        wanted = [tasks.TASKS[task](fact) for fact in self.facts]
        right = sum(map(operator.eq, self.answers[name], wanted))
        print(f"   {name} on its task: {right} of {HELD_OUT} right; the first: {self.answers[name][0]}")
        return right

    def score_values(self, name: str) -> int:
        """How many of all values of `name`'s answers are in JSON and in Spanish."""
        found = [
            tasks.spanish_values(answer, fact) for answer, fact in zip(self.answers[name], self.facts, strict=True)
        ]
        right, read = sum(count or 0 for count in found), sum(count is not None for count in found)
        print(f"   {name} on the fusion's task: {read} of {HELD_OUT} JSON, {right} of {3 * HELD_OUT} values in Spanish")
        return right

    def peft_answers(self, adapter: Path | None, prompts: list[str]) -> list[str]:
        """Answers by plain transformers and PEFT."""
        tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.eval().generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/real"), help="where everything is made")
    parser.add_argument("--fresh", action="store_true", help="make base and adapters anew")
    asked = parser.parse_args()
    if asked.fresh:
        shutil.rmtree(asked.directory, ignore_errors=True)
    start = time.monotonic()
    Walk(asked.directory).go()
    print(f"\nall of it: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
