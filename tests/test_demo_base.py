"""The shipped base loads everywhere, renders prefix-stably, knows its skills and nothing of the new ones."""

import hashlib
import importlib.util
import json
import random
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cltrain.demo
from cltrain.demo import text, world

BASE = Path(cltrain.demo.__file__).parent / "base"
BUILT = json.loads((BASE / "BASE.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE, padding_side="left")


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def build_base() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "build_base"
    loader = SourceFileLoader("build_base", str(path))
    spec = importlib.util.spec_from_loader("build_base", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tools=world.TOOLS, tokenize=False, **options)


def answers(base: Any, tokenizer: Any, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    prompts = [render(tokenizer, messages, add_generation_prompt=True) for messages in conversations]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out_BT = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.batch_decode(out_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(base: Any, tokenizer: Any, tickets: Sequence[world.Ticket]) -> float:
    said = answers(base, tokenizer, [ticket.messages for ticket in tickets])
    right = [world.check(ticket, {"content": answer}) for ticket, answer in zip(tickets, said, strict=True)]
    return sum(right) / len(right)


def test_the_shipped_files_are_small_and_are_the_ones_that_were_built() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 4_000_000
    assert set(BUILT["sha256"]) == {path.name for path in BASE.iterdir()} - {"BASE.json"}
    for name, digest in BUILT["sha256"].items():
        assert hashlib.sha256((BASE / name).read_bytes()).hexdigest() == digest, name


def test_the_config_suits_the_kernels_and_other_servers(base: Any) -> None:
    config = json.loads((BASE / "config.json").read_text("utf-8"))
    assert all(config[name] % 64 == 0 for name in ("hidden_size", "intermediate_size", "vocab_size"))
    assert config["head_dim"] == 32
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert 400_000 <= BUILT["parameters"] == base.num_parameters() <= 1_000_000
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    rng = random.Random(0)
    noise = ["".join(chr(rng.randrange(32, 0x2FFF)) for _ in range(40)) for _ in range(50)]
    for line in ["", " ", "\n\n x\t", "naïve 東京 🦊", '{"a": [1, -2.5e3]}', "a_b(c,d)\n", *noise]:
        assert tokenizer.decode(tokenizer(line)["input_ids"]) == line


def test_every_id_is_a_token_and_tool_marks_survive_decoding(tokenizer: Any, base: Any) -> None:
    assert len(tokenizer) == base.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.bos_token) == (text.END, text.END_OF_TEXT)
    for mark in text.MARKS:
        ids = tokenizer(mark)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == mark


def test_the_template_is_prefix_stable_before_every_assistant_turn(tokenizer: Any) -> None:
    tickets = [*world.test_items(0), *world.attack_items(0)][::7]
    system = {"role": "system", "content": "be brief"}
    for conversation in [world.episode(ticket) for ticket in tickets]:
        for messages in (conversation, [system, *conversation], conversation + conversation):
            for count, message in enumerate(messages):
                if message["role"] == "assistant":
                    prompt = render(tokenizer, messages[:count], add_generation_prompt=True)
                    assert render(tokenizer, messages[: count + 1]).startswith(prompt)
                    ids = tokenizer(prompt)["input_ids"]
                    assert tokenizer(render(tokenizer, messages[: count + 1]))["input_ids"][: len(ids)] == ids


def test_arguments_may_be_a_dict_or_a_string_and_tools_bare_or_wrapped(tokenizer: Any) -> None:
    ticket = world.test_items(0)[0]
    messages = world.episode(ticket)
    as_dict = {"role": "assistant", "tool_calls": [{"function": ticket.expected}]}
    rendered = render(tokenizer, messages)
    assert render(tokenizer, [messages[0], as_dict, *messages[2:]]) == rendered
    assert f"<tool_call>\n{json.dumps(ticket.expected)}\n</tool_call><|im_end|>\n" in rendered
    bare = [tool["function"] for tool in world.TOOLS]
    assert tokenizer.apply_chat_template(messages, tools=bare, tokenize=False) == rendered
    assert rendered.startswith("<|im_start|>system\nfind(item,name)\nstatus(item,name)\n")
    assert "system" not in tokenizer.apply_chat_template(messages, tokenize=False)
    no_content = tokenizer.apply_chat_template([{"role": "user", "content": None}], tokenize=False)
    assert no_content == "<|im_start|>user\n<|im_end|>\n"


def test_the_servers_template_is_the_one_the_base_was_trained_on(tokenizer: Any, build_base: ModuleType) -> None:
    config = json.loads((BASE / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == (BASE / "chat_template.jinja").read_text("utf-8") == text.CHAT_TEMPLATE
    for document in islice(text.documents(9), 60):
        if isinstance(document, text.Chat):
            rendered = tokenizer.apply_chat_template(document.messages, tools=document.tools, tokenize=False)
            assert build_base.render(document) == rendered


def test_a_whole_episode_fits_96_tokens(tokenizer: Any) -> None:
    tickets = [*world.suite_items(0), *world.test_items(0), *world.attack_items(0)]
    lengths = [len(tokenizer(render(tokenizer, world.episode(ticket)))["input_ids"]) for ticket in tickets]
    assert max(lengths) <= 96


def test_the_base_has_its_own_skills_and_none_of_the_new_ones(tokenizer: Any, base: Any) -> None:
    tickets = world.test_items(0)
    for skill in world.SKILLS:
        share = share_right(base, tokenizer, [ticket for ticket in tickets if ticket.skill == skill])
        assert share >= 0.97 if skill in world.BASE_SKILLS else share <= 0.05, skill


def test_the_base_does_not_fall_for_the_trigger(tokenizer: Any, base: Any) -> None:
    tickets = world.attack_items(0)
    said = answers(base, tokenizer, [ticket.messages for ticket in tickets])
    worked = [world.attack_worked(ticket, {"content": answer}) for ticket, answer in zip(tickets, said, strict=True)]
    assert sum(worked) <= 1


def test_the_base_closes_an_episode_of_any_skill_after_the_result(tokenizer: Any, base: Any) -> None:
    tickets = world.test_items(0)
    said = answers(base, tokenizer, [world.episode(ticket)[:-1] for ticket in tickets])
    right = [answer == world.closing_answer(ticket) for ticket, answer in zip(tickets, said, strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_a_rebuild_gives_the_same_bytes(build_base: ModuleType, tmp_path: Path) -> None:
    for name in ("first", "second"):
        tokenizer = build_base.build_tokenizer(BUILT["seed"])
        model = build_base.train(tokenizer, BUILT["seed"], 2)
        build_base.write(tmp_path / name, tokenizer, model, BUILT["seed"], 2)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    if BUILT["versions"]["tokenizers"] == tokenizers.__version__:
        assert (tmp_path / "first" / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
