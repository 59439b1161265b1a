"""Anchors: what the base itself says, the fixed text on which every update's distance from the base is measured.

Sampled from the base or read from the owner's JSONL, then pinned as `<base12>-<hash12>.jsonl`, whose name is checked
against its bytes at every later use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile, attach, sync_directory
from cltrain.models.base import Base
from cltrain.models.chat import render_example, render_prompt
from cltrain.models.forward import batches_of, logits_of, next_log_probs, token_kl
from cltrain.records import Example, TokenRow

STRATUM = "anchor"
MIN_ANCHORS = 8  # every KL bound rests on them; fewer only where the owner sets trainer.num_anchors lower


def load_anchors(
    base: Base, *, file: Path | None, count: int, max_tokens: int, seed: int, directory: Path
) -> tuple[list[TokenRow], str]:
    """The pinned anchors for these arguments and the sha256 of their file; made and pinned under `directory` if new.

    `file`: JSONL of {"text"} (its first `max_tokens` tokens) or {"messages", "tools"?} (its assistant turns; when it
    ends with another's turn the base writes the answer), the first `count` lines; None: sampled from the base.
    Raises DataError for a bad line, fewer than min(count, MIN_ANCHORS) anchors, or any pinned file of this base that
    was changed.
    """
    source = "sampled" if file is None else _read_bytes_digest(file)
    made_from = {"base": base.digest, "source": source, "count": count, "max_tokens": max_tokens, "seed": seed}
    for pinned in sorted(directory.glob(f"{base.digest[:12]}-*.jsonl")):
        found = read_anchors(pinned)  # also of those for other arguments: releases were measured on them
        if json.loads(pinned.read_bytes().splitlines()[0]) == made_from:
            return found
    if file is None:
        sampled = sample_base(base, count, max_tokens, seed)
        rows = [_row(i, ids, [0.0] + [1.0] * (len(ids) - 1)) for i, ids in enumerate(sampled)]
    else:
        rows = _from_file(base, file, count, max_tokens, seed)
    rows = [row for row in rows if len(row.ids) > 1]
    if len(rows) < (least := min(count, MIN_ANCHORS)):
        raise DataError(
            f"{file or base.path} gave {len(rows)} anchors of two tokens or more, and every KL bound rests on them: at "
            f"least {least} are needed (trainer.anchors; trainer.num_anchors = {count})"
        )
    lines = [json.dumps(made_from, sort_keys=True)]
    lines += [json.dumps({"ids": row.ids, "weights": row.weights}) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    _pin(pinned_at(directory, base.digest, digest), content)
    return rows, digest


def pinned_at(directory: Path, base_digest: str, digest: str) -> Path:
    """Where anchors of this sha256 are pinned."""
    return directory / f"{base_digest[:12]}-{digest[:12]}.jsonl"


def read_anchors(pinned: Path) -> tuple[list[TokenRow], str]:
    """Rows of a pinned file and its sha256. Raises DataError when its bytes are not those its name promises."""
    try:
        content = pinned.read_bytes()
    except OSError as error:
        raise DataError(f"anchors {pinned} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if not pinned.stem.endswith("-" + digest[:12]):
        raise DataError(f"anchors {pinned} were changed since they were pinned: restore them from a backup")
    return read_rows(content), digest


def read_rows(content: bytes) -> list[TokenRow]:
    """Rows of a pinned file's bytes, which the caller has checked."""
    lines = [json.loads(line) for line in content.decode().splitlines()[1:]]
    return [_row(i, line["ids"], line["weights"]) for i, line in enumerate(lines)]


def sample_base(base: Base, count: int, max_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """`count` texts of up to `max_tokens` tokens, sampled from the base at temperature 1.

    They begin in turn with the base's bos token (what it says by itself) and with what starts its chat template (how it
    talks as an agent), where the two differ. A row's draws depend on (seed, row) alone. A text ends early only at a
    token that ends a document, not a turn.
    """
    starts = _start_tokens(base)
    prompts = [(starts[i % len(starts)],) for i in range(count)]
    return _continue(base, prompts, min(max_tokens, base.context), seed, _document_ends(base))


def mean_kl(base: Base, rows: Sequence[TokenRow], p: AdapterFile | None, q: AdapterFile | None) -> float:
    """Mean forward KL(p || q) per predicted token of the rows in nats, full vocabulary; None is the bare base."""
    model_p = base.model if p is None else attach(base, p)
    model_q = base.model if q is None else attach(base, q)
    total, num_tokens = 0.0, 0
    for group in batches_of(base, rows):
        part = [rows[i] for i in group]
        kl_M = token_kl(next_log_probs(base, model_p, part), next_log_probs(base, model_q, part))
        total += float(kl_M.double().sum())
        num_tokens += kl_M.numel()
    if num_tokens == 0:
        raise DataError("no tokens to measure a KL on")
    return total / num_tokens


def _from_file(base: Base, file: Path, count: int, max_tokens: int, seed: int) -> list[TokenRow]:
    rows: list[TokenRow] = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if len(rows) == count:
            break
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if isinstance(item.get("text"), str):
                ids = base.tokenizer(item["text"], verbose=False)["input_ids"][:max_tokens]
                rows.append(_row(number, ids, [0.0] + [1.0] * (len(ids) - 1)))
            else:
                rows.append(_from_messages(base, number, item, max_tokens, seed))
        except (ValueError, AttributeError, LookupError, TypeError, DataError) as error:
            raise DataError(f'{file}:{number}: not an anchor {{"text"}} or {{"messages"}}: {error}') from None
    return rows


def _from_messages(base: Base, number: int, item: dict[str, Any], max_tokens: int, seed: int) -> TokenRow:
    messages, tools = tuple(item["messages"]), tuple(item.get("tools") or ())
    if messages[-1].get("role") == "assistant":
        targets = tuple(i for i, message in enumerate(messages) if message.get("role") == "assistant")
        example = Example(f"{STRATUM}-{number}", STRATUM, STRATUM, messages, targets, tools)
        row = render_example(base.tokenizer, base.context, example)
        return _row(number, row.ids, row.weights)
    prompt = tuple(render_prompt(base.tokenizer, messages, tools))
    limit = min(base.context, len(prompt) + max_tokens)
    ends = _document_ends(base) | _turn_ends(base)
    (ids,) = _continue(base, [prompt], limit, seed + number, ends)
    return _row(number, ids, [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt)))


def _continue(
    base: Base, prompts: Sequence[tuple[int, ...]], limit: int, seed: int, ends: set[int]
) -> list[tuple[int, ...]]:
    """Sample on from prompts of one length until `limit` tokens or an end token (kept)."""
    rows = [list(prompt) for prompt in prompts]
    num_prompt = len(rows[0]) if rows else 0
    uniform_BT = torch.stack([_uniform(seed, i, limit) for i in range(len(rows))]) if rows else torch.zeros(0, limit)
    done = [False] * len(rows)
    ids_BT, cache = torch.tensor(rows), None
    with torch.no_grad():
        for t in range(num_prompt, limit):
            out = base.model.model(input_ids=ids_BT.to(base.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids_BT = _draw(logits_of(base, out.last_hidden_state[:, -1]), uniform_BT[:, t])
            for i, token in enumerate(ids_BT[:, 0].tolist()):
                if not done[i]:
                    rows[i].append(token)
                    done[i] = token in ends
            if all(done):
                break
    return [tuple(row) for row in rows]


def _draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token per row by inverting the distribution function at `uniform_B`: ids_B1."""
    steps_BV = torch.softmax(logits_BV.double().cpu(), dim=-1).cumsum(-1)
    ids_B1 = torch.searchsorted(steps_BV, uniform_B[:, None].double() * steps_BV[:, -1:], right=True)
    return ids_B1.clamp(max=logits_BV.shape[-1] - 1)


def _uniform(seed: int, row: int, count: int) -> Tensor:
    key = hashlib.sha256(f"anchors\0{seed}\0{row}".encode()).digest()
    return torch.rand(
        count, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big")), dtype=torch.float64
    )


def _start_tokens(base: Base) -> list[int]:
    """Where the base's own text begins: its bos token and the first token of its chat template, if they exist."""
    bos = base.tokenizer.bos_token_id
    starts = [] if bos is None else [int(bos)]
    if getattr(base.tokenizer, "chat_template", None) or not starts:
        starts.append(int(render_prompt(base.tokenizer, [{"role": "user", "content": "a"}])[0]))
    return list(dict.fromkeys(starts))


def _turn_ends(base: Base) -> set[int]:
    chosen = getattr(base.model.generation_config, "eos_token_id", None)
    listed = chosen if isinstance(chosen, list) else [chosen]
    return {int(token) for token in (*listed, base.tokenizer.eos_token_id) if token is not None}


def _document_ends(base: Base) -> set[int]:
    """End and padding tokens, less those that the chat template puts between turns."""
    ends = _turn_ends(base) | ({base.tokenizer.pad_token_id} - {None})
    if not getattr(base.tokenizer, "chat_template", None):
        return ends
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    return ends - set(render_prompt(base.tokenizer, turns))


def _row(number: int, ids: Sequence[int], weights: Sequence[float]) -> TokenRow:
    return TokenRow(f"{STRATUM}-{number}", STRATUM, STRATUM, tuple(ids), tuple(weights))


def _read_bytes_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"anchors {file} cannot be read: {error.strerror} (trainer.anchors)") from None


def _pin(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".writing")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        sync_directory(file.parent)
    except OSError as error:
        raise DataError(f"cannot pin anchors at {file}: {error.strerror}") from error
