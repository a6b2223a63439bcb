"""One architecture tried with everything that adapters of it can adapt."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from loraflow.core.architecture import find_decoder_layers
from loraflow.errors import LoraflowError
from tests.zoo.bases import NotBuilt, small_model
from tests.zoo.checks import run_checks
from tests.zoo.images import image_reader, reads_images
from tests.zoo.replay import Reader
from tests.zoo.targets import targets_of, targets_of_images

STOPS = ("not built", "not checked", "raw", "refused")

Found = dict[str, Any]
"""Of one architecture, as JSON: one of `STOPS` with the reason; or "targets", with the kind and detail of each check's
outcome; and "no image" with the reason, where it was to read one."""


def try_architecture(name: str) -> Found:
    """Every check, for every kind of targets that the architecture has."""
    try:
        base = small_model(name)
    except NotBuilt as reason:
        return {"not built": str(reason)}
    try:
        layers = find_decoder_layers(base.model)
    except LoraflowError as refusal:
        return {"refused": str(refusal)}
    found: Found = {"targets": {}}
    trials = [(targets, Reader()) for targets in targets_of(base, layers, Reader())]
    if reads_images(base):
        try:
            reader = image_reader(base)
            trials += [(targets, reader) for targets in targets_of_images(base, layers)]
        except NotBuilt as reason:
            found["no image"] = str(reason)
    for targets, reader in trials:
        with tempfile.TemporaryDirectory() as directory:
            ended = run_checks(base, targets, reader, Path(directory))
        found["targets"][targets.name] = {check: dataclasses.astuple(outcome) for check, outcome in ended.items()}
    return found if found["targets"] else {"not built": "it has no linear modules in its decoder layers"}
