"""Images for any architecture that reads them, without its processor: random pixels, and as many tokens as it needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.zoo.bases import Base, NotBuilt, first_line, silent
from tests.zoo.replay import Reader, random_words


def reads_images(base: Base) -> bool:
    """Whether it has a way in for pixels."""
    return "pixel_values" in inspect.signature(type(base.model).forward).parameters


def image_reader(base: Base) -> Reader:
    """Words after one random image.

    Raises:
        NotBuilt: if the architecture takes no such image.
    """
    reasons = []
    for inputs in _candidates(base.model):
        try:
            with silent():
                reader = _reader(base.model, inputs)
                words = random_words(1)
                said = reader.at_once(base.model, words)
                if torch.allclose(said, _with_other_pixels(reader).at_once(base.model, words)):
                    raise NotBuilt("it says the same to other pixels")
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
        else:
            return reader
    raise NotBuilt(f"its image: {'; '.join(reasons) or 'no known form'}")


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Pixels as architectures take them: patches in one row each with their grid, one image, a list of one image."""
    parameters = inspect.signature(type(model).forward).parameters
    config = getattr(model.config, "vision_config", model.config)
    generator = torch.Generator().manual_seed(7)
    patch, size = (
        _whole(getattr(config, name, None), usual) for name, usual in (("patch_size", 8), ("image_size", 32))
    )
    if "image_grid_thw" in parameters:
        side, frames = 4, getattr(config, "temporal_patch_size", None) or 1
        channels = getattr(config, "in_channels", None) or 3
        for shape in ((side * side, channels * frames * patch * patch), (side * side, channels, patch, patch)):
            pixels = torch.randn(*shape, generator=generator, dtype=model.dtype)
            yield {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
        return
    pixels = torch.randn(1, 3, size, size, generator=generator, dtype=model.dtype)
    for form in (pixels, pixels[None]):
        yield {"pixel_values": form}
        if "image_sizes" in parameters:
            yield {"pixel_values": form, "image_sizes": torch.tensor([[size, size]])}


@torch.no_grad()
def _reader(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Reader:
    config = model.config
    features = model.get_image_features(**inputs)
    features = getattr(features, "pooler_output", features)
    parts = [features] if isinstance(features, Tensor) else list(features)
    count = sum(part.numel() for part in parts) // config.get_text_config(decoder=True).hidden_size
    image = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    starts = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    start = next((getattr(config, name) for name in starts if hasattr(config, name)), 1)
    parameters = inspect.signature(type(model).forward).parameters
    types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in parameters), None)
    return Reader(torch.tensor([start, *[image] * count]), inputs, types, image)


def _with_other_pixels(reader: Reader) -> Reader:
    inputs = {**reader.inputs, "pixel_values": reader.inputs["pixel_values"].flip(-1) + 0.5}
    return Reader(reader.prefix, inputs, reader.types, reader.image)


def _whole(value: object, default: int) -> int:
    if isinstance(value, list | tuple):
        value = value[0]
    return value if isinstance(value, int) else default
