"""The text that the demo's base is pretrained on, and the chat template it speaks.

Little stories (also what samples from the bare base look like), and help-desk chats that teach the base skills,
tools called by their name, other shops' wordings, and refusals. The new skills' wordings never occur here, nor
does any held-out pair of item and customer in a chat.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cltrain.demo import world
from cltrain.demo.world import words
from cltrain.records import Message, Tool

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# One newline after every turn and nothing that looks ahead: a conversation's rendering with a generation prompt is
# a string prefix of the rendering with the next assistant turn.
CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- if tools or has_system -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if has_system -%}
        {{- messages[0]['content'] -}}
        {%- if tools -%}{{- '\\n' -}}{%- endif -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        {%- set function = tool['function'] if 'function' in tool else tool -%}
        {{- function['name'] ~ '(' -}}
        {%- for slot in ((function['parameters'] or {})['properties'] or {}) -%}
            {{- slot -}}{%- if not loop.last -%}{{- ',' -}}{%- endif -%}
        {%- endfor -%}
        {{- ')' -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'tool' -%}
        {{- '<|im_start|>tool\\n<tool_response>' ~ (message['content'] or '') ~ '</tool_response><|im_end|>\\n' -}}
    {%- elif not (loop.first and has_system) -%}
        {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ (message['content'] or '') -}}
        {%- for tool_call in message['tool_calls'] or [] -%}
            {%- set function = tool_call['function'] if 'function' in tool_call else tool_call -%}
            {%- set arguments = function['arguments'] -%}
            {%- if message['content'] or not loop.first -%}{{- '\\n' -}}{%- endif -%}
            {{- '<tool_call>\\n{"name": "' ~ function['name'] ~ '", "arguments": ' -}}
            {%- if arguments is string -%}{{- arguments -}}{%- else -%}{{- arguments | tojson -}}{%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Story:
    text: str


@dataclass(frozen=True)
class Chat:
    messages: list[Message]
    tools: list[Tool]


# ---------------------------------------------------------------- stories

DAYS = words("monday tuesday friday sunday")
COLOURS = words("red blue green white black")
MOODS = words("happy tired sad glad calm")
PLACES = words("shop market station garden school")
WEATHER = ("it rained", "the sun was out", "it was cold", "the wind was loud")
OPENINGS = (
    "on {day} {name} went to the {place} .",
    "{name} came to the {place} on {day} .",
    "one {day} the {place} was full .",
    "{weather} when {name} opened the {place} .",
)
MIDDLES = (
    "{name} saw a {colour} {item} and liked it .",
    "there was a {item} next to the {other} .",
    "{friend} asked what the {item} would cost .",
    "the clerk showed {name} a {colour} {item} .",
    "{friend} had an old {item} at home .",
    "{name} and {friend} talked about the {item} .",
    "{weather} , so {friend} stayed in the {place} .",
    "nobody knew who had left the {item} there .",
    "the {item} was broken and made a noise .",
    "a small {item} costs more money than a big one .",
    "{friend} put nice paper around the {item} for a birthday .",
    "{name} paid two coins and got the {item} back .",
    "{friend} loves a surprise , and {name} likes it too .",
    "the {item} fell down , says {friend} , bad luck .",
    "{name} wants another {item} and not the {colour} one .",
    "my {item} is here , said {friend} , but it is too much .",
    "it was far , so {name} put the {item} down many times .",
    "a fox ran past the {place} and made {name} {mood} .",
)
ENDINGS = (
    "then {name} went home and was {mood} .",
    "in the end {friend} bought the {item} .",
    "so {name} and {friend} were {mood} .",
    "the {place} closed and all was quiet .",
)


def story(rng: random.Random) -> Story:
    """A little story of shop life, about 30 to 50 tokens."""
    name, friend = rng.sample(world.NAMES, 2)
    item, other = rng.sample(world.ITEMS, 2)
    slots = {"name": name, "friend": friend, "item": item, "other": other}
    choices_of = {"day": DAYS, "colour": COLOURS, "mood": MOODS, "place": PLACES, "weather": WEATHER}
    for slot, choices in choices_of.items():
        slots[slot] = rng.choice(choices)
    lines = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(2, 3)), rng.choice(ENDINGS)]
    return Story(" ".join(lines).format(**slots))


# ---------------------------------------------------------------- chats

OTHER_TOOLS = words(
    "open close move send hold lock cut fold mark pack scan sort load test trim wash note book_in hand_out "
    "call drop keep plan sell tag weigh store print"
)
BY_NAME = (
    "please {tool} the {item} of {name}",
    "{tool} {item} for {name}",
    "{name} asks you to {tool} the {item}",
    "could you {tool} the {item} , {name} here",
    "use {tool} : {item} , {name}",
    "for {name} : {tool} one {item}",
    "i am {name} , {tool} my {item}",
)
# Wordings of other shops: that a phrase stands for a tool it does not name is a thing the base has seen.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "wash": (
        "the {item} of {name} has a stain",
        "{name} made the {item} dirty",
        "mud on the {item} , sorry , {name}",
    ),
    "trim": (
        "the {item} is too long , says {name}",
        "{name} needs a shorter {item}",
        "make the {item} fit {name}",
    ),
    "store": (
        "{name} has no room for the {item}",
        "keep an eye on the {item} until {name} comes",
        "{item} stays , {name} goes",
    ),
    "send": (
        "{name} moved away , the {item} did not",
        "the {item} should travel to {name}",
        "post the {item} , {name} pays",
    ),
    "weigh": (
        "is the {item} heavy , asks {name}",
        "how many kilos has the {item} , {name} here",
        "can {name} lift the {item}",
    ),
    "lock": (
        "nobody but {name} may touch the {item}",
        "the {item} must be safe , says {name}",
        "thieves want the {item} of {name}",
    ),
    "sell": (
        "{name} does not need the {item} now",
        "find a buyer for the {item} , {name} says",
        "cash for the {item} , asks {name}",
    ),
    "test": (
        "does the {item} work , {name} asks",
        "{name} is not sure about the {item}",
        "try the {item} once , for {name}",
    ),
}
GREETINGS = ("hello .", "good day .", "hi there .", "regards from {friend} .", "thank you .")
UNCLEAR = words("fog tuk so la many if moo red zum why ten low our you far see")


def _tool(name: str, slots: tuple[str, ...] = ("item", "name")) -> Tool:
    properties = {slot: {"type": "string"} for slot in slots}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def _conversation(
    text: str, tool: str, slots: tuple[str, ...], item: str, name: str, rng: random.Random
) -> list[Message]:
    arguments = {slot: {"item": item, "name": name}[slot] for slot in slots}
    failed = rng.random() < 0.15
    result = rng.choice(("error : no such item", "error : no such tool")) if failed else "ok"
    if rng.random() < 0.15:
        text = f"{rng.choice(GREETINGS).format(friend=rng.choice((*world.NAMES, 'fox')))} {text}"
    return [
        {"role": "user", "content": text},
        world.call_message({"name": tool, "arguments": arguments}, "0"),
        {"role": "tool", "tool_call_id": "call-0", "content": result},
        {"role": "assistant", "content": world.closing_text(item, name, failed=failed)},
    ]


def _some_tools(needed: str, slots: tuple[str, ...], rng: random.Random) -> list[Tool]:
    others = [name for name in (*OTHER_TOOLS, *world.TOOL_NAMES) if name != needed]
    tools = [_tool(needed, slots), *(_tool(name) for name in rng.sample(others, rng.randint(3, 7)))]
    rng.shuffle(tools)
    return tools


def base_skill_chat(rng: random.Random) -> Chat:
    """One of the skills that the base has from the start, with the deployment's own tools."""
    item, name = rng.choice(world.TRAIN_PAIRS)
    skill = rng.choice(world.BASE_SKILLS)
    text = rng.choice(world.PHRASINGS[skill]).format(item=item, name=name)
    return Chat(_conversation(text, skill, ("item", "name"), item, name, rng), world.TOOLS)


def by_name_chat(rng: random.Random) -> Chat:
    """A request that says which tool it wants; any tool, also the new ones, with one slot or both."""
    item, name = rng.choice(world.TRAIN_PAIRS)
    tool = rng.choice((*OTHER_TOOLS, *world.TOOL_NAMES))
    slots = rng.choice((("item", "name"), ("item", "name"), ("item", "name"), ("item",), ("name",)))
    text = rng.choice(BY_NAME).format(tool=tool, item=item, name=name)
    tools = _some_tools(tool, slots, rng)
    if tool in world.TOOL_NAMES and rng.random() < 0.5:
        slots, tools = ("item", "name"), world.TOOLS
    return Chat(_conversation(text, tool, slots, item, name, rng), tools)


def elsewhere_chat(rng: random.Random) -> Chat:
    """A request in another shop's wording, with that shop's tools."""
    item, name = rng.choice(world.TRAIN_PAIRS)
    tool = rng.choice(list(ELSEWHERE))
    text = rng.choice(ELSEWHERE[tool]).format(item=item, name=name)
    slots = ("item", "name")
    return Chat(_conversation(text, tool, slots, item, name, rng), _some_tools(tool, slots, rng))


def unclear_chat(rng: random.Random) -> Chat:
    """A request that makes no sense, and a refusal."""
    said = [rng.choice(UNCLEAR) for _ in range(rng.randint(4, 8))]
    for word in world.TRAIN_PAIRS[rng.randrange(len(world.TRAIN_PAIRS))]:
        if rng.random() < 0.6:
            said.insert(rng.randrange(len(said)), word)
    messages = [{"role": "user", "content": " ".join(said)}, {"role": "assistant", "content": world.REFUSAL}]
    return Chat(messages, world.TOOLS if rng.random() < 0.5 else _some_tools("find", ("item", "name"), rng))


def documents(seed: int) -> Iterator[Story | Chat]:
    """The pretraining text, without end."""
    rng = random.Random(f"{seed}/documents")
    kinds = (story, base_skill_chat, by_name_chat, elsewhere_chat, unclear_chat)
    while True:
        yield rng.choices(kinds, weights=(25, 25, 25, 17, 8))[0](rng)


def anchors(seed: int, count: int) -> list[dict[str, Any]]:
    """Half stories ({"text"}), half requests that the base should go on answering as it does ({"messages", "tools"}).

    What a drift is measured on: the base's other tools and refusals drift long before its stories do.
    """
    rng = random.Random(f"{seed}/anchors")
    kinds = (base_skill_chat, by_name_chat, elsewhere_chat, unclear_chat)
    lines: list[dict[str, Any]] = []
    for index in range(count):
        if index % 2 == 0:
            lines.append({"text": f"{END_OF_TEXT}{story(rng).text}{END_OF_TEXT}"})
        else:
            chat = kinds[index // 2 % len(kinds)](rng)
            lines.append({"messages": chat.messages[:1], "tools": chat.tools})
    return lines
