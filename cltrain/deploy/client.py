"""One client for every server that speaks vLLM's dialect, the embedded one among them; sglang.py has the other one.
Imports no torch.

Nothing is retried here: the caller knows what a failure means. Every failure is a ServerError, never a made-up answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

from cltrain.config import ServerConfig
from cltrain.errors import ConfigError, NotHeldError, ServerError, UnavailableError
from cltrain.records import Message, Tool

SCORE_ROWS = 16  # sequences per scoring request
QUICK_S = 5.0  # for what needs no model: a server that takes longer to list its adapters is away
ENGINE = re.compile(r'^vllm:.*\bengine="(\w+)"', re.MULTILINE)
AWAY = (404, 502, 503, 504)  # nobody is behind the address, or nobody who speaks this dialect


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated message. Token ids and log-probs are None when the server did not give them."""

    message: Message
    model: str
    prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: str | None


Answers = list[Answer]  # named here because ServerClient.list hides the built-in inside the class
Scores = list[float]
AllScores = list[Scores]


class ServerClient:
    """A server at `url`; `model` is the base's name there. Safe to share between threads; close it when done."""

    LOAD, UNLOAD, HEALTH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/health"
    ASK_IDS: ClassVar[Mapping[str, bool]] = {"return_token_ids": True}
    HOW_TO_START = "vLLM has it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"

    def __init__(self, url: str, model: str, timeout_s: float = 120.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=self.url, timeout=timeout_s, limits=httpx.Limits(max_connections=None), trust_env=False,
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
        )  # fmt: skip

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url_for(self, model: str) -> str:
        """Where programs that ask that model themselves find it."""
        return self.url

    def name_of(self, model: str) -> str:
        """What a request must call the model."""
        return model

    def check_takes(self, rank: int, targets: Sequence[str], max_adapters: int) -> None:
        """Raise ConfigError where the server says that it is too small for such adapters, or for so many.

        vLLM says how many engines it has (each metric is there once for each), and of its limits nothing: there
        `server.max_rank` and `server.max_adapters` are what was declared. Raises UnavailableError where nobody answers.
        """
        num_engines = len(set(ENGINE.findall(self._send("GET", "/metrics").text)))
        if num_engines > 1:
            raise ConfigError(
                f"{self.url} runs data parallel, and a load reaches one of its {num_engines} engines: start as many "
                "servers without --data-parallel-size and name them in server.urls"
            )

    def health(self) -> bool:
        """Whether the server answers at all."""
        try:
            return self._http.get(self.HEALTH, timeout=QUICK_S).status_code == 200
        except httpx.HTTPError:
            return False

    def list(self) -> dict[str, str]:
        """Loaded adapters: name -> root directory, without the base."""
        cards = self._json("GET", "/v1/models").get("data", [])
        return {card["id"]: card.get("root") or "" for card in cards if card.get("parent") and card["id"] != self.model}

    def load(self, name: str, path: Path) -> None:
        """Load an adapter under a new name. Idempotent: the same root already there is success.

        Raises ServerError when another directory has the name, or the server refuses; never reloads in place, because
        that serves mixed weights (three ways in vLLM 0.32).
        """
        if not path.is_absolute():
            raise ServerError(f"adapter path {path} must be absolute: a server takes a relative one for a hub's name")
        response = self._send("POST", self.LOAD, {"lora_name": name, "lora_path": str(path)})
        if response.status_code == 200:
            return
        if response.status_code == 404 and not response.text.startswith('{"error"'):
            raise ServerError(f"{self.url} has no {self.LOAD}: {self.HOW_TO_START}")
        root = self.list().get(name)
        if root == str(path):
            return
        if root is not None:
            raise ServerError(f"{self.url} already serves {name} from {root}, not from {path}: names are never reused")
        raise ServerError(f"{self.url} did not load {name}: {_reason(response)}")

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that began on it finish. One that is not there is fine."""
        response = self._send("POST", self.UNLOAD, {"lora_name": name})
        if response.status_code not in (200, 404):
            raise ServerError(f"{self.url} did not unload {name}: {_reason(response)}")

    def generate(
        self,
        model: str,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Answer:
        """One chat answer by exactly that model. Raises ServerError also when another model's name comes back."""
        self._check_held(model)
        body: dict[str, Any] = {
            "model": self.name_of(model),
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "logprobs": True,
            **self.ASK_IDS,
        }
        if tools:
            body["tools"] = list(tools)
        if seed is not None:
            body["seed"] = seed
        answer = self._json("POST", "/v1/chat/completions", body, model)
        try:
            choice = answer["choices"][0]
            self._check_model(answer, model)
            prompt_ids, completion_ids = self._ids_in(answer)
            kept = ("role", "content", "tool_calls")
            entries = (choice.get("logprobs") or {}).get("content")
            return Answer(
                message={key: choice["message"][key] for key in kept if choice["message"].get(key) or key == "content"},
                model=model,
                prompt_ids=_ids(prompt_ids),
                completion_ids=_ids(completion_ids),
                logprobs=None if entries is None else tuple(float(entry["logprob"]) for entry in entries),
                finish_reason=choice.get("finish_reason"),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} answered something that is no chat completion: {error!r}") from None

    def generate_many(
        self,
        model: str,
        prompts: Sequence[tuple[Sequence[Message], Sequence[Tool]]],
        max_tokens: int,
        concurrency: int = 16,
    ) -> Answers:
        """Greedy answers in the order of the prompts, `concurrency` at a time. The first failure is raised."""
        if not prompts:
            return []
        with ThreadPoolExecutor(max(1, min(concurrency, len(prompts)))) as pool:
            tasks = [pool.submit(self.generate, model, m, t, max_tokens=max_tokens) for m, t in prompts]
            try:
                return [task.result() for task in tasks]
            except ServerError:
                pool.shutdown(cancel_futures=True)
                raise

    def score_many(self, model: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AllScores:
        """The log-probs that the model gives to the completion of each (prompt ids, completion ids), in few requests. A
        prompt has at least one token."""
        found: AllScores = []
        for start in range(0, len(pairs), SCORE_ROWS):
            part = pairs[start : start + SCORE_ROWS]
            body = {
                "model": model,
                "prompt": [[*prompt, *completion] for prompt, completion in part],
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
            }
            answer = self._json("POST", "/v1/completions", body, model)
            self._check_model(answer, model)
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                found += [_scores(choice, *pair) for choice, pair in zip(choices, part, strict=True)]
            except (KeyError, TypeError, ValueError) as error:
                raise ServerError(
                    f"{self.url} gave no log-probs for the prompt (vLLM's prompt_logprobs): {error!r}"
                ) from None
        return found

    def _ids_in(self, answer: dict[str, Any]) -> tuple[Any, Any]:
        """Token ids of prompt and answer, as far as they are told."""
        return answer.get("prompt_token_ids"), answer["choices"][0].get("token_ids")

    def _check_held(self, model: str) -> None:
        """Before a server is asked that would answer for a model which it does not hold; this one says 404."""

    def _is_not_held(self, response: httpx.Response) -> bool:
        return response.status_code == 404

    def _check_model(self, answer: dict[str, Any], model: str) -> None:
        if answer.get("model") != self.name_of(model):
            raise ServerError(f"{self.url} was asked for {model} and answered as {answer.get('model')}")

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, model: str | None = None
    ) -> dict[str, Any]:
        """A JSON object. `model`: who is asked; NotHeldError where the server does not hold it."""
        answer = self._value(method, path, body, model)
        if not isinstance(answer, dict):
            raise ServerError(f"{self.url}{path} answered something that is not an object: {str(answer)[:200]}")
        return answer

    def _value(self, method: str, path: str, body: dict[str, Any] | None, model: str | None) -> Any:
        response = self._send(method, path, body)
        if response.status_code != 200:
            said = f"{self.url}{path} answered {response.status_code}: {_reason(response)}"
            if model is not None and self._is_not_held(response):
                raise NotHeldError(said, model)
            raise (UnavailableError if response.status_code in AWAY else ServerError)(said)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} answered something that is not JSON: {response.text[:200]}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            if method == "GET":
                return self._http.get(path, timeout=QUICK_S)
            return self._http.request(method, path, json=body)
        except httpx.TimeoutException:
            limit = f"{QUICK_S:g} s" if method == "GET" else f"{self._timeout_s:g} s (server.timeout_s)"
            raise UnavailableError(f"{self.url}{path} did not answer within {limit}") from None
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.url}{path} cannot be reached: {error}") from None


def clients_of(config: ServerConfig) -> list[ServerClient]:
    """One for every replica."""
    from cltrain.deploy.sglang import SglangClient  # it stands on this file

    kind = SglangClient if config.kind == "sglang" else ServerClient
    return [kind(url, config.model or "base", config.timeout_s, config.api_key) for url in config.replicas]


def _scores(choice: dict[str, Any], prompt: Sequence[int], completion: Sequence[int]) -> Scores:
    entries = choice["prompt_logprobs"][len(prompt) :]
    return [float(entry[str(token)]["logprob"]) for token, entry in zip(completion, entries, strict=True)]


def _ids(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(token) for token in value)


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
        return str(body["error"]["message"] if "error" in body else body.get("error_message") or body["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{response.status_code} {response.text[:200]}"
