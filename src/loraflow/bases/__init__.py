"""Base models: loaded from an id or a path, and told from others."""

from loraflow.bases.beside import AddedTokens, Beside, Manner, TokenRecord, choose, read_beside, with_tokens
from loraflow.bases.loading import (
    QUANTIZATIONS,
    BaseOptions,
    find_tokenizer,
    load_base,
    load_empty_base,
    load_tokenizer,
    read_base_config,
)
from loraflow.bases.record import BaseRecord, base_record, check_base, check_base_files, files_digest
from loraflow.bases.sharded import check_sharding, whole

__all__ = [
    "QUANTIZATIONS",
    "AddedTokens",
    "BaseOptions",
    "BaseRecord",
    "Beside",
    "Manner",
    "TokenRecord",
    "base_record",
    "check_base",
    "check_base_files",
    "check_sharding",
    "choose",
    "files_digest",
    "find_tokenizer",
    "load_base",
    "load_empty_base",
    "load_tokenizer",
    "read_base_config",
    "read_beside",
    "whole",
    "with_tokens",
]
