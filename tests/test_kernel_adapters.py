"""Several adapters in one batch: each token by its own and no other, and aloud where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cltrain_kernels import Adapters, hidden_at
from cltrain_kernels.decoder import with_slots
from peft import LoraConfig

from tests.kernel_parts import applied, assert_same, batch, fill, gradients_of, make


def test_two_adapters_in_one_batch_are_each_trained_as_if_alone() -> None:
    model, ids = make("qwen3"), batch(shape=(3, 11))
    model.add_adapter(
        "other", LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    )
    fill(model, 5, "other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    applied(model)
    places = torch.arange(33).reshape(3, 11)[:, 3:]
    rows = {"default": [0, 2], "other": [1]}
    alone, hidden = {}, {}
    for name, mine in rows.items():
        model.set_adapter(name)
        model.zero_grad()
        at = torch.arange(11 * len(mine)).reshape(-1, 11)[:, 3:].flatten()
        hidden[name] = hidden_at(model, ids[mine], at)
        hidden[name].square().sum().backward()
        alone |= {n: gradient for n, gradient in gradients_of(model).items() if f".{name}." in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.zero_grad()
    slots = torch.tensor([0, 1, 0])[:, None].expand(3, 11)
    both = hidden_at(model, ids, places.flatten(), Adapters(("default", "other"), slots))
    both.square().sum().backward()
    torch.testing.assert_close(both[:8], hidden["default"][:8], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[8:16], hidden["other"], rtol=1e-5, atol=1e-6)
    together = gradients_of(model)
    assert together.keys() == alone.keys()
    assert len(alone) == 2 * 2 * (7 + 4)
    assert_same((0.0, together), (0.0, alone))


def test_several_adapters_without_the_ops_are_an_error() -> None:
    model = make("llama")
    both = Adapters(("default",), torch.zeros(2, 11, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"apply\(\) them"):
        hidden_at(model, batch(), torch.tensor([1]), both)
    applied(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        hidden_at(model, batch(), torch.tensor([1]), both)


def with_two() -> Any:
    """A model with "default" in all modules and "other" in one."""
    model = make("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    fill(model, 5, "other")
    applied(model)
    return model


@pytest.mark.parametrize(
    ("names", "slot", "said"),
    [
        (("typo",), 0, "no module has an adapter 'typo'; there are default, other"),
        (("default", "typo"), 0, "no module has an adapter 'typo'"),
        (("default", "other"), 2, "slot 2 is beyond the 2 adapters"),
        (("default", "other"), -2, "slot -2 is beyond"),
        (("other", "other"), 1, "a name repeats: other, other"),
    ],
)
def test_adapters_and_slots_that_do_not_exist_are_named(names: tuple[str, ...], slot: int, said: str) -> None:
    slots = torch.zeros(2, 11, dtype=torch.int64)
    slots[1, 3] = slot
    with pytest.raises(ValueError, match=said):
        hidden_at(with_two(), batch(), torch.tensor([1]), Adapters(names, slots))


def test_slots_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"slots of shape \(1, 11\) for tokens of shape \(2, 11\)"):
        hidden_at(with_two(), batch(), torch.tensor([1]), Adapters(("default",), torch.zeros(1, 11, dtype=torch.int64)))


def test_merged_and_disabled_adapters_are_no_slots() -> None:
    model, places = with_two(), torch.tensor([1, 14])
    both = Adapters(("default", "other"), torch.tensor([0, 1])[:, None].expand(2, 11))
    before = hidden_at(model, batch(), places, both)
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters are disabled"):
        hidden_at(model, batch(), places, both)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged into the base"):
        hidden_at(model, batch(), places, both)
    model.unmerge_adapter()
    torch.testing.assert_close(hidden_at(model, batch(), places, both), before)


def test_slots_on_a_device_are_not_read() -> None:
    """The meta device stands in for a GPU: reading a value there is an error."""
    slots = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    made = with_slots(torch.zeros(2, 3, 4, device="meta"), Adapters(("default",), slots))
    assert made.shape == (2, 3, 4)
