"""What form an answer may be asked to have; light, for requests are read without the library that holds to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraflow.errors import LoraflowError

# What larger ones cost grows faster than they do.
MOST_CHARACTERS = 2**16


@dataclass(frozen=True)
class Form:
    """The form of an answer.

    Attributes:
        kind: JSON by a schema, text by a regular expression, or one of some texts as a list in JSON.
        content: the schema, the expression, the list.
        param: the field that asks for it.

    Raises:
        LoraflowError: if it is too long.
    """

    kind: Literal["schema", "regex", "choice"]
    content: str
    param: str

    def __post_init__(self) -> None:
        if len(self.content) > MOST_CHARACTERS:
            raise LoraflowError(
                f"`{self.param}` has {len(self.content)} characters, and may have {MOST_CHARACTERS}. Ask for less."
            )

    @classmethod
    def of_schema(cls, schema: dict[str, Any] | str, param: str) -> Form:
        """JSON by a schema."""
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return cls("schema", text, param)

    @classmethod
    def of_choice(cls, texts: Sequence[str], param: str) -> Form:
        """One of some texts."""
        return cls("choice", json.dumps(texts, ensure_ascii=False), param)
