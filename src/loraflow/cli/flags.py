"""The library's messages, with its parameters as the command line spells them."""

from __future__ import annotations

import re

# A message of the library gives a parameter as `name=value`; `{value}` is that value, and `{pairs}` a mapping as a=b.
_FLAGS = {
    "adapters": "--lora-modules {pairs}",
    "admin_key_file": "--admin-key-file",
    "admin_keys": "--admin-key",
    "allow_code": "--allow-code",
    "allowed_hosts": "--allowed-host",
    "api_key_file": "--api-key-file",
    "api_keys": "--api-key",
    "auto_top_k": "--auto-top-k {value}",
    "base": "--base",
    "cell_gpus": "--cell-gpus {value}",
    "chat_template": "--chat-template",
    "device": "--device {value}",
    "fields": "--prompt-field and --completion-field",
    "load_from": "--load-from",
    "mean_weights_on": "--mean-weights-on data.jsonl",
    "overwrite": "--overwrite",
    "resume": "--resume",
    "skip_broken": "--skip-broken",
    "train_on": "--train-on {value}",
    "setting": "--setting {value}",
    "weights": "--method-option 'weights={value}'",
}


def with_flags(message: str) -> str:
    """A message with flags in the places of the parameters that it proposes; `name=...` stands for the flag alone."""
    return re.sub(r"`(\w+)=([^`]*)`", _flag, message)


def _flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    if name not in _FLAGS:
        return found[0]
    if value == "...":
        return _FLAGS[name].partition(" ")[0]
    pairs = re.sub(r"[{}\"]", "", value).replace(": ", "=").replace(",", "")
    return _FLAGS[name].format(value=value.strip("'"), pairs=pairs)
