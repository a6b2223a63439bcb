"""Adapters and fusions that come and go while a server runs: by an admin's key, from allowed folders only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from loraflow.errors import LoraflowError
from loraflow.serving.logs import log_facts
from loraflow.serving.protocol import ApiError
from loraflow.serving.served import Served
from loraflow.serving.service import Service, find_model

log = logging.getLogger("loraflow.serving")


def permitted(path: Path, folders: Sequence[Path]) -> Path:
    """The directory that is meant, if it is in an allowed folder with all of its files; links are followed.

    It is absolute, or relative to one of the folders. What is elsewhere and what is nowhere have one answer: it tells
    nothing of the rest of the disk.

    Raises:
        ApiError: if it is not allowed.
    """
    roots = [folder.resolve() for folder in folders]
    for candidate in [path] if path.is_absolute() else [root / path for root in roots]:
        try:
            found = candidate.resolve()
            real = [found, *(entry.resolve() for entry in found.iterdir())] if _inside(found, roots) else []
        except (OSError, RuntimeError, ValueError):
            continue
        if real and all(_inside(one, roots) for one in real):
            return found
    message = f"The directory {str(path)!r} is not there, or not inside the folders that the server may load from"
    raise ApiError(403, f"{message}.", kind="permission_error", param="lora_path")


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


class Admin:
    """Changes what a service offers, one change at a time; requests that run are answered as they were asked."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._changing = asyncio.Lock()

    async def load(self, name: str, path: str) -> Served:
        """Offer an adapter or a saved fusion.

        Raises:
            ApiError: if it may not be loaded, or cannot.
        """
        folders = self._service.config.load_from

        def permit(directory: str) -> str:
            return str(permitted(Path(directory), folders))

        async with self._changing:
            try:
                served = await asyncio.to_thread(self._service.catalog.load, name, path, permit)
            except LoraflowError as error:
                raise ApiError(400, str(error)) from error
        log_facts(log, {"loaded": served.id, "digest": served.digest})
        return served

    async def unload(self, name: str) -> None:
        """Offer a model no longer; its memory is free once the requests that use it are answered.

        Raises:
            ApiError: if there is no such model, or it is still needed.
        """
        service, catalog = self._service, self._service.catalog
        async with self._changing:
            find_model(catalog, name, "lora_name")
            try:
                leaving = catalog.withdraw(name)
            except LoraflowError as error:
                raise ApiError(400, str(error), param="lora_name") from error
            while leaving and service.engine.uses(leaving):
                await asyncio.sleep(0.05)
            await asyncio.to_thread(catalog.free)
        service.metrics.keep(catalog.served, catalog.model.adapter_names)
        log_facts(log, {"unloaded": name})
