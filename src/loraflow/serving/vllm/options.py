"""What `--model-loader-extra-config` says about a fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraflow.errors import LoraflowError


@dataclass(frozen=True)
class FusionOptions:
    """The loader's settings.

    Attributes:
        fusion: directory or Hub id of the saved fusion.
        digest: the fusion's digest (`SavedFusion.digest`), where a fusion that has changed since is to be refused.
        adapters: other places of the adapters, by name.
        load_format: how the base itself is loaded; one of vLLM's own load formats.
        unverified: whether bases that have not been compared with transformers are served too.
    """

    fusion: str
    digest: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    load_format: str = "auto"
    unverified: bool = False

    @classmethod
    def parse(cls, extra: Any) -> tuple[FusionOptions, dict[str, Any]]:
        """The settings, and those that are for the base's own loader.

        Raises:
            LoraflowError: if the fusion is missing, or a setting is of the wrong kind.
        """
        given = dict(extra or {}) if isinstance(extra, Mapping | None) else {}
        if not isinstance(given.get("fusion"), str):
            raise LoraflowError(
                f"--load-format loraflow needs a fusion, found --model-loader-extra-config {extra!r}. Give it as "
                '\'{"fusion": "DIRECTORY"}\'.'
            )
        known = {f.name for f in dataclasses.fields(cls)}
        options = cls(**{key: given.pop(key) for key in list(given) if key in known})
        for key, kind in (("digest", str | None), ("adapters", Mapping), ("load_format", str), ("unverified", bool)):
            value = getattr(options, key)
            if not isinstance(value, kind):
                raise LoraflowError(f"`{key}` (={value!r}) in --model-loader-extra-config is of the wrong kind.")
        return options, given
