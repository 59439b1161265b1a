"""Loading the frozen base: local safetensors only, no remote code, nothing trainable, dropout off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cltrain.errors import ConfigError, DataError
from cltrain.models.digest import base_digest, base_path, weight_files
from cltrain.models.shapes import check_family


@dataclass(frozen=True)
class Base:
    """The frozen base. `model` is shared and never written to; `context` is the longest row in tokens."""

    path: Path
    model: Any  # a transformers *ForCausalLM in eval mode
    tokenizer: Any
    digest: str
    context: int
    device: str


def stop_ids(base: Base) -> frozenset[int]:
    """The tokens that end an answer: what the tokenizer, the config and the generation config call end of sequence."""
    generation = getattr(base.model, "generation_config", None)
    found = [base.tokenizer.eos_token_id, base.model.config.eos_token_id, getattr(generation, "eos_token_id", None)]
    ids = [i for one in found if one is not None for i in (one if isinstance(one, list | tuple) else [one])]
    return frozenset(int(i) for i in ids)


def read_config(directory: Path) -> dict[str, Any]:
    """The base's config.json. Raises DataError when it is missing or no JSON object."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise DataError(f"{directory} is not a model directory (no config.json): set base.path to one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{directory / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{directory / 'config.json'} is not a JSON object")
    return config


def load_base(
    path: Path | None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    context: int | None = None,
    num_threads: int = 1,
) -> Base:
    """Load a Llama, Qwen2, Qwen3 or Mistral directory (None: the shipped base), frozen, in eval mode.

    `context` in tokens may only lower the base's own limit; `num_threads` is set for the whole process, because the
    bytes of a result depend on it. Raises DataError for a directory that cannot be used, ConfigError for a setting.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    directory = base_path(path)
    config = read_config(directory)
    check_family(config)
    weight_files(directory)
    limit = int(config.get("max_position_embeddings") or 0)
    if context is not None and limit and context > limit:
        raise ConfigError(f"base.context = {context} is more than the {limit} tokens that {directory} can attend to")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"base.device = {device!r}: torch sees no such device here; use cpu")
    torch.set_num_threads(num_threads)
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        SafetensorError,
    ) as error:  # transformers lets all of these out
        raise DataError(f"{directory} cannot be loaded: {error}") from error
    model.requires_grad_(False)
    model.eval().to(device)
    return Base(directory, model, tokenizer, base_digest(directory), context or limit or 2048, device)
