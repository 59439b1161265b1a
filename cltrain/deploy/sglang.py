"""The same client for SGLang: its own routes, names and log-probs, as its source of 0.5.23 has them.

Written from that source and tried on no real engine. What there is to know of it: a model name without a colon, any
at all, is answered by the bare base and echoed back, so an adapter is always asked for as `base:adapter`, and the echo
proves nothing; one adapter too many makes it forget the least used one; an unloaded one comes back by itself when it is
asked for; unloading waits for the requests that run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx

from cltrain.deploy.client import SCORE_ROWS, AllScores, Scores, ServerClient
from cltrain.errors import ConfigError, NotHeldError, ServerError, UnavailableError

UNKNOWN = ("never been loaded", "Failed to implicitly load", "are not loaded")


class SglangClient(ServerClient):
    """One SGLang server; `model` is its --served-model-name."""

    LOAD, UNLOAD, HEALTH = "/load_lora_adapter", "/unload_lora_adapter", "/ready"
    ASK_IDS: ClassVar[Mapping[str, bool]] = {"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True}
    HOW_TO_START = "is that SGLang?"

    def name_of(self, model: str) -> str:
        return model if model == self.model else f"{self.model}:{model}"

    def check_takes(self, rank: int, targets: Sequence[str], max_adapters: int) -> None:
        """What /server_info says of its flags. Raises UnavailableError where nobody answers."""
        flags = self._json("GET", "/server_info")
        if not flags.get("enable_lora"):
            raise ConfigError(
                f"{self.url} takes no adapters: start SGLang with --enable-lora --max-lora-rank {rank} "
                f"--lora-target-modules {' '.join(targets)}"
            )
        if (flags.get("dp_size") or 1) > 1 or flags.get("enable_dp_attention"):
            raise ConfigError(
                f"{self.url} runs data parallel, and SGLang loads no adapters there: start as many servers without "
                "--dp-size and --enable-dp-attention and name them in server.urls"
            )
        if (flags.get("max_lora_rank") or rank) < rank:
            raise ConfigError(
                f"{self.url} takes adapters up to rank {flags['max_lora_rank']}, and adapter.rank is {rank}: start it "
                f"with --max-lora-rank {rank}"
            )
        taken = flags.get("lora_target_modules") or ["all"]
        if missing := [target for target in targets if "all" not in taken and target not in taken]:
            raise ConfigError(f"{self.url} takes no LoRA on {', '.join(missing)}: see its --lora-target-modules")
        if (flags.get("max_loaded_loras") or max_adapters) < max_adapters:
            raise ConfigError(
                f"{self.url} keeps {flags['max_loaded_loras']} adapters and forgets the least used one for another; "
                f"server.max_adapters is {max_adapters}: start it with --max-loaded-loras {max_adapters}, or without"
            )

    def load(self, name: str, path: Path) -> None:
        """As ServerClient's; where it would make the server forget another adapter, a ServerError instead."""
        most, present = self._json("GET", "/server_info").get("max_loaded_loras"), self.list()
        if most is not None and name not in present and len(present) >= most:
            raise ServerError(
                f"{self.url} did not load {name}: it holds {len(present)} adapters, its --max-loaded-loras, and would "
                "forget one of them"
            )
        super().load(name, path)

    def unload(self, name: str) -> None:
        """As ServerClient's, once the requests that run on it have ended; if those take longer than `server.timeout_s`,
        it forgets the adapter by itself after them."""
        try:
            response = self._send("POST", self.UNLOAD, {"lora_name": name})
        except UnavailableError:
            if name in self.list():
                raise
            return
        if response.status_code != 200 and "does not exist" not in response.text:
            raise ServerError(f"{self.url} did not unload {name}: {response.status_code} {response.text[:200]}")

    def score_many(self, model: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AllScores:
        """As ServerClient's, by the native /generate: its OpenAI routes give no log-probs of a prompt."""
        self._check_held(model)
        found: AllScores = []
        for start in range(0, len(pairs), SCORE_ROWS):
            part = pairs[start : start + SCORE_ROWS]
            body: dict[str, Any] = {
                "input_ids": [[*prompt, *completion] for prompt, completion in part],
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,  # and nothing of the prompt comes from a cache
            }
            if model != self.model:
                body["lora_path"] = model
            try:
                rows = self._value("POST", "/generate", body, model)
                found += [_scores(row, *pair) for row, pair in zip(rows, part, strict=True)]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ServerError(f"{self.url} gave no log-probs for the prompt: {error!r}") from None
        return found

    def _check_held(self, model: str) -> None:
        """Any other name without a colon would be answered by the bare base."""
        if model != self.model and model not in self.list():
            raise NotHeldError(f"{self.url} does not list {model}", model)

    def _ids_in(self, answer: dict[str, Any]) -> tuple[Any, Any]:
        told = answer.get("sglext") or {}
        return told.get("input_ids"), (told.get("output_ids") or [None])[0]

    def _is_not_held(self, response: httpx.Response) -> bool:
        return is_unknown(response.status_code, response.text)


def is_unknown(status: int, said: str) -> bool:
    """Whether that is how it says that it does not hold the adapter."""
    return status == 400 and any(words in said for words in UNKNOWN)


def _scores(row: dict[str, Any], prompt: Sequence[int], completion: Sequence[int]) -> Scores:
    """An entry of `input_token_logprobs` is (log-prob, token id, text). The first token has no log-prob, and the last
    id of the vocabulary is shown as 0."""
    entries = row["meta_info"]["input_token_logprobs"]
    asked = [*prompt, *completion]
    if [entry[1] or token for entry, token in zip(entries, asked, strict=True)] != asked:
        raise ValueError("of other tokens than were asked")
    return [float(entry[0]) for entry in entries[len(prompt) :]]
