"""Random-initialised small model directories with tokenizer and Hermes chat template, made in a second for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEXT = """\
user assistant system tool the parcel 17 is late, where is my order? please refund the order of Anna
<tools> </tools> <tool_call> </tool_call> <tool_response> </tool_response>
{"name": "refund", "arguments": {"order": "A17", "reason": "late"}} {"name": "track", "arguments": {"order": "B04"}}
{"type": "function", "function": {"name": "refund", "description": "Pay an order back.", "parameters": {"type":
"object", "properties": {"order": {"type": "string"}, "reason": {"type": "string"}}, "required": ["order"]}}}
I have sent the money back. Your parcel arrives on Monday. Sorry for the trouble, is there anything else I can do?
"""

TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
        },
    }
    for name in ("refund", "track")
)


def make_tiny_base(
    directory: Path,
    family: str = "llama",
    context: int = 512,
    *,
    hidden: int = 64,
    num_layers: int = 2,
    vocabulary: int = 448,
    num_vocabulary: int | None = None,
    text: str = TEXT,
    seed: int = 0,
    initializer_range: float = 0.1,
) -> Path:
    """Write config, safetensors weights and tokenizer to `directory` and return it.

    `family`: llama, qwen2, qwen3 or mistral. About 0.15 M parameters with the defaults, head_dim 32, dimensions
    multiples of 64. `num_vocabulary` (default: `vocabulary`) may exceed the tokenizer's ids, learned from
    `text`. `seed` fixes the weights; larger `initializer_range` makes outputs less uniform.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocabulary, context, text)
    config = AutoConfig.for_model(
        family,
        vocab_size=num_vocabulary or vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=num_layers,
        num_attention_heads=max(2, hidden // 32),
        num_key_value_heads=max(2, hidden // 32) // 2,
        head_dim=32,
        max_position_embeddings=context,
        initializer_range=initializer_range,
        tie_word_embeddings=family != "mistral",
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer(vocabulary: int = 448, context: int = 512, text: str = TEXT) -> Any:
    """A byte-level BPE of at most `vocabulary` ids (>= 320), learned from `text`, with a ChatML/Hermes template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tool_call(name: str, **arguments: Any) -> dict[str, Any]:
    """An OpenAI assistant message that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def ticket(order: str, tool: str = "refund") -> list[dict[str, Any]]:
    """A user's ticket, the tool call that answers it, the tool's result and a closing word."""
    return [
        {"role": "user", "content": f"please {tool} the order {order}"},
        tool_call(tool, order=order),
        {"role": "tool", "tool_call_id": "call_0", "content": "ok"},
        {"role": "assistant", "content": "I have done it."},
    ]
