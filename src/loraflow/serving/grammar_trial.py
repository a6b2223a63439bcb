"""A process of its own in which grammars are tried first: what takes too long or too much there is killed with it.

llguidance bounds most of the work that a grammar makes, though not all of it: a schema of forty characters can keep it
busy for half a minute, and nothing can end that from outside. Only what was built here is built in the server.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from typing import Any

from loraflow.errors import LoraflowError

LONGEST_S = 2.0
_START_S = 60.0
_END_S = 1.0
_MEMORY_BYTES = 4 * 2**30

# Below llguidance's own: some milliseconds for a token, and some megabytes of states.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_items_in_row": 1_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Between the parts of JSON: a model that likes blanks would fill its answer with them. Keywords that are not known are
# refused, whatever the schema itself says of that.
_JSON: Any = {"whitespace_pattern": " ?", "lenient": False}


def reading_tokenizer(settings: dict[str, Any]) -> Any:
    """llguidance's tokenizer, by the arguments of its class."""
    import llguidance

    return llguidance.LLTokenizer(settings["tokenizer"], n_vocab=settings["n_vocab"], eos_token=settings["eos_token"])


def build(tokenizer: Any, kind: str, content: str) -> Any:
    """A matcher of a grammar, at its start.

    Raises:
        LoraflowError: if there is none, or no text is of that form.
    """
    import llguidance

    matcher_type = llguidance.LLMatcher
    try:
        if kind == "schema":
            grammar = matcher_type.grammar_from_json_schema(content, overrides=_JSON)
        elif kind == "regex":
            grammar = matcher_type.grammar_from_regex(content)
        else:
            grammar = matcher_type.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(content))))
        matcher = matcher_type(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))
    except ValueError as error:
        raise LoraflowError(str(error)) from error
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().removesuffix("\n<non-verbose/>")
        raise LoraflowError("no text is of this form" if reason.startswith("NoExtension") else reason)
    return matcher


class GivenUpError(LoraflowError):
    """A grammar about which nothing is known, since the process that tried it was ended."""


class Trial:
    """The process, which is started when it is needed, as the server sees it.

    Args:
        settings: arguments of the tokenizer.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None

    def check(self, kind: str, content: str) -> None:
        """Try to build a grammar.

        Raises:
            GivenUpError: if that takes too much.
            LoraflowError: with the reason, if it cannot be built.
        """
        if self._process is None:
            command = [sys.executable, "-m", "loraflow.serving.grammar_trial"]
            # A terminal's Ctrl-C is for the server alone.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                self._ask(self._settings, _START_S)
            except GivenUpError as error:
                raise GivenUpError(f"the process that tries grammars did not start: {error}") from error
        reason = self._ask({"kind": kind, "content": content}, LONGEST_S)
        if reason:
            raise LoraflowError(reason)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None

    def _ask(self, question: dict[str, Any], timeout_s: float) -> str:
        """Its answer; where there is none, or none in time, the process is ended.

        Raises:
            GivenUpError: with the reason, if there is none.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            self.close()
            if late.is_set():
                raise GivenUpError(f"it takes more than {timeout_s:g} s to be prepared")
            raise GivenUpError(
                f"the process that prepares it ended (exit code {process.returncode}), as it does where it needs more "
                f"than {_MEMORY_BYTES >> 30} GiB of memory"
            )
        return str(json.loads(answer))


def main() -> None:
    """Read questions, a line each, and answer with what is wrong with their grammars."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    tokenizer = None
    for line in sys.stdin:
        question = json.loads(line)
        reason = ""
        try:
            if tokenizer is None:
                tokenizer = reading_tokenizer(question)
            else:
                build(tokenizer, question["kind"], question["content"])
        except LoraflowError as error:
            reason = str(error)
        print(json.dumps(reason), flush=True)


if __name__ == "__main__":
    main()
