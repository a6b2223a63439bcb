"""LoRA adapters as PEFT writes them, read without PEFT's model surgery and checked before anything is fused.

An adapter is `adapter_config.json` and `adapter_model.safetensors`, in a directory or on the Hub. What is read here
gives exactly what PEFT gives when it loads the same files; what cannot is refused with the file, the key and the
remedy.
"""

from loraflow.adapters.bank import AdapterBank, all_adapters
from loraflow.adapters.base import CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterSource, LoraModule, tensors_digest
from loraflow.adapters.copies import uncompared_copies
from loraflow.adapters.keys import write_keys
from loraflow.adapters.loading import load_adapter
from loraflow.adapters.match import match_adapter
from loraflow.adapters.stored import BankEntry, StoredAdapter, StoredUpdates, match_adapters, outlined, outlines
from loraflow.adapters.vectors import AdapterVectors

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterBank",
    "AdapterSource",
    "AdapterVectors",
    "BankEntry",
    "LoraModule",
    "StoredAdapter",
    "StoredUpdates",
    "all_adapters",
    "load_adapter",
    "match_adapter",
    "match_adapters",
    "outlined",
    "outlines",
    "tensors_digest",
    "uncompared_copies",
    "write_keys",
]
