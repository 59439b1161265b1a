"""Writes trl.json: small batches, the settings they ran under, and what TRL's own code makes of them. Not run in CI.

In an environment of its own, with torch installed first as a CPU build:
    pip install torch==2.13.0 trl==1.16.0
    HF_HUB_OFFLINE=1 python tests/golden/record_trl.py
Every trainer is TRL's own, built offline around random tiny Llamas. Two things stand in for what cannot run here: fixed
completions for a generation server, and for `distill` logits that pass an identity as output head. Gradients are those
of TRL's scalar loss with respect to the numbers that our functions take.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.distillation_trainer import _chunked_divergence_loss

VOCABULARY = 64
SPECIAL = ("<pad>", "<eos>", "<unk>")
BETA, DESIRABLE, UNDESIRABLE = 0.3, 1.0, 1.3
LOW, HIGH, CISPO_MAX, TRUNCATE = 0.2, 0.28, 1.5, 1.6
REWARDS = (1.0, 0.0, 0.4, 0.0, 0.7, 1.0)


def model(seed: int) -> LlamaForCausalLM:
    """A random Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).float()


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words w0 ... w60 and three special tokens."""
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(count: int, shortest: int, longest: int, seed: int) -> list[str]:
    """Random sentences of `shortest` to `longest` words."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=rng)
    return [" ".join(f"w{int(i)}" for i in torch.randint(60, (int(n),), generator=rng)) for n in lengths]


def settings(folder: str) -> dict[str, Any]:
    """What every trainer's config is given: CPU, float32, nothing reported."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def tapped(module: torch.nn.Module, field: str) -> list[torch.Tensor]:
    """Collects `field` of the module's every output; those with a gradient keep it."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        tensor = getattr(output, field)
        if tensor.requires_grad:
            tensor.retain_grad()
        seen.append(tensor)

    module.register_forward_hook(keep)
    return seen


def batch_of(trainer: Any, rows: range) -> Any:
    """These rows of the trainer's own prepared data set through its own collator."""
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def numbers(tensor: torch.Tensor) -> Any:
    """Nested lists; nine digits hold a float32 exactly."""
    if tensor.dim() == 0:
        return float(f"{tensor.item():.9g}")
    return [numbers(part) for part in tensor.detach()]


def record_sft(folder: str) -> dict[str, Any]:
    """Mean NLL of the completions' tokens; rows hold ids and which of them count, hidden_MD the predicting states."""
    data = {"prompt": texts(3, 2, 4, 1), "completion": [" " + text for text in texts(3, 2, 7, 2)]}
    trainer = trl.SFTTrainer(
        model=model(1),
        args=trl.SFTConfig(**settings(folder), completion_only_loss=True),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
    )
    states = tapped(trainer.model.model, "last_hidden_state")
    batch = batch_of(trainer, range(3))
    ids_BT, labels_BT, mask_BT = batch["input_ids"], batch["labels"], batch["attention_mask"]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    predicting_BT = labels_BT[:, 1:] != -100
    return {
        "ids": [ids[mask.bool()].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)],
        "counts": [
            (labels[mask.bool()] != -100).long().tolist() for labels, mask in zip(labels_BT, mask_BT, strict=True)
        ],
        "head_VD": numbers(trainer.model.lm_head.weight),
        "hidden_MD": numbers(states[0][:, :-1][predicting_BT]),
        "loss": numbers(loss),
        "hidden_grad_MD": numbers(states[0].grad[:, :-1][predicting_BT]),
    }


def record_dpo(folder: str) -> dict[str, Any]:
    """Mean sigmoid loss of four pairs; log-probs are summed over the answer."""
    data = {"prompt": texts(4, 2, 4, 3), "chosen": texts(4, 2, 5, 4), "rejected": texts(4, 2, 5, 5)}
    trainer = trl.DPOTrainer(
        model=model(2),
        ref_model=model(3),
        args=trl.DPOConfig(**settings(folder), beta=BETA, loss_type="sigmoid"),
        train_dataset=Dataset.from_dict({key: [" " + text for text in value] for key, value in data.items()}),
        processing_class=tokenizer(),
    )
    policy, reference = tapped(trainer.model, "log_probs"), tapped(trainer.ref_model, "log_probs")
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(4)))
    loss.backward()
    chosen_B, rejected_B = policy[0].sum(-1).chunk(2)
    reference_chosen_B, reference_rejected_B = reference[0].sum(-1).chunk(2)
    chosen_grad_B, rejected_grad_B = answer_gradients(policy[0]).chunk(2)
    return {
        "beta": BETA,
        "chosen_B": numbers(chosen_B),
        "rejected_B": numbers(rejected_B),
        "reference_chosen_B": numbers(reference_chosen_B),
        "reference_rejected_B": numbers(reference_rejected_B),
        "loss": numbers(loss),
        "chosen_grad_B": numbers(chosen_grad_B),
        "rejected_grad_B": numbers(rejected_grad_B),
    }


def answer_gradients(logp_BT: torch.Tensor) -> torch.Tensor:
    """Gradient of each answer's summed log-prob: the one that all of its tokens share."""
    first = (logp_BT != 0).long().argmax(-1, keepdim=True)  # exactly 0 marks a prompt's or a padding token
    return logp_BT.grad.gather(1, first)[:, 0]


def record_kto(folder: str) -> list[dict[str, Any]]:
    """Three batches of four: mixed labels twice, then desirable only. TRL rotates answers by one row for the KL."""
    labels = [True, False, True, False, False, True, False, False, True, True, True, True]
    data = {"prompt": texts(12, 2, 4, 6), "completion": [" " + text for text in texts(12, 2, 5, 7)], "label": labels}
    trainer = trl.KTOTrainer(
        model=model(4),
        ref_model=model(5),
        args=trl.KTOConfig(
            **settings(folder),
            beta=BETA,
            desirable_weight=DESIRABLE,
            undesirable_weight=UNDESIRABLE,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
    )
    cases = []
    policy, reference = tapped(trainer.model, "log_probs"), tapped(trainer.ref_model, "log_probs")
    for start in (0, 4, 8):
        policy.clear()
        reference.clear()
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(start, start + 4)))
        loss.backward()
        (mismatched, own), (reference_mismatched, reference_own) = (
            policy,
            reference,
        )  # TRL scores mismatched pairs first
        cases.append(
            {
                "beta": BETA,
                "desirable": DESIRABLE,
                "undesirable": UNDESIRABLE,
                "labels_B": [1 if label else -1 for label in labels[start : start + 4]],
                "logp_B": numbers(own.sum(-1)),
                "reference_B": numbers(reference_own.sum(-1)),
                "mismatched_B": numbers(mismatched.sum(-1)),
                "reference_mismatched_B": numbers(reference_mismatched.sum(-1)),
                "divergence": float(f"{trainer._metrics['train']['kl'][-1]:.9g}"),
                "loss": numbers(loss),
                "logp_grad_B": numbers(answer_gradients(own)),
            }
        )
    return cases


def record_policy(folder: str, kind: str) -> dict[str, Any]:
    """Token-mean loss of six completions whose sampler, proximal and current policies differ.

    The trainer is told that it samples with vLLM only after it is built (vLLM is not installed), and `_generate` hands
    out fixed completions with the log-probs of another model; scoring, ratios and loss are TRL's.
    """
    trainer = trl.GRPOTrainer(
        model=model(6),
        reward_funcs=lambda completions, **_: list(REWARDS),
        args=trl.GRPOConfig(
            **settings(folder),
            loss_type={"ppo": "dapo", "cispo": "cispo"}[kind],
            epsilon=LOW,
            epsilon_high={"ppo": HIGH, "cispo": CISPO_MAX}[kind],
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=TRUNCATE,
            per_device_train_batch_size=6,
            num_generations=3,
            max_completion_length=5,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts(2, 3, 3, 8)}),
        processing_class=tokenizer(),
    )
    prompts = [trainer.train_dataset[i // 3]["prompt"] for i in range(6)]
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    answer_ids = trainer.processing_class(texts(6, 2, 5, 9))["input_ids"]
    behaviour = model(6)
    nudge(behaviour, 0.03, seed=1)
    sampled = [log_probs(behaviour, p, a) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    answers = trainer.processing_class.batch_decode(answer_ids)
    trainer.use_vllm = True
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate = lambda _: (prompt_ids, answer_ids, None, answers, sampled, {}, None, None)
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    nudge(trainer.model, 0.03, seed=2)
    policy = tapped(trainer.model, "log_probs")
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    keep_BT = inputs["completion_mask"].bool()
    width = keep_BT.shape[1]
    logp_BT, grad_BT = policy[0][:, -width:], policy[0].grad[:, -width:]
    case = {
        "kind": kind,
        "logp_M": numbers(logp_BT[keep_BT]),
        "proximal_M": numbers(inputs["old_per_token_logps"][keep_BT]),
        "behaviour_M": [float(f"{value:.9g}") for values in sampled for value in values],
        "advantages_M": numbers(inputs["advantages"][:, None].expand_as(logp_BT)[keep_BT]),
        "truncate": TRUNCATE,
        "loss": numbers(loss),
        "logp_grad_M": numbers(grad_BT[keep_BT]),
    }
    if kind == "ppo":
        share = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
        return {**case, "epsilon": LOW, "epsilon_high": HIGH, "clip_share": float(f"{share:.9g}")}
    return {**case, "epsilon_high": CISPO_MAX}


def nudge(module: torch.nn.Module, size: float, seed: int) -> None:
    """Move every weight by normal noise."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=rng))


@torch.no_grad()
def log_probs(module: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> list[float]:
    """The answer's token log-probs."""
    logp_TV = module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return [float(logp_V[token]) for logp_V, token in zip(logp_TV, answer, strict=True)]


def record_distill() -> list[dict[str, Any]]:
    """Per-position generalised JSD; TRL's beta 0 is KL(teacher || student), 1 the reverse, 0.5 Jensen-Shannon."""
    rng = torch.Generator().manual_seed(10)
    teacher_MV, student_MV = (2 * torch.randn(5, 17, generator=rng) for _ in range(2))
    head = torch.eye(17)
    cases = []
    for kind, beta in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)):
        values, gradients = [], []
        for teacher_V, student_V in zip(teacher_MV, student_MV, strict=True):
            leaf = student_V[None, None].clone().requires_grad_()
            value, _, _ = _chunked_divergence_loss(leaf, teacher_V[None, None], head, head, torch.ones(1, 1), beta)
            value.backward()
            values.append(value)
            gradients.append(leaf.grad[0, 0])
        cases.append(
            {
                "kind": kind,
                "teacher_MV": numbers(teacher_MV),
                "student_MV": numbers(student_MV),
                "divergence_M": numbers(torch.stack(values)),
                "student_grad_MV": numbers(torch.stack(gradients)),
            }
        )
    return cases


def main() -> None:
    """Record every case beside this file, one top-level entry a line."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "versions": {
                "trl": trl.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "sft": record_sft(folder),
            "dpo": record_dpo(folder),
            "kto": record_kto(folder),
            "policy": [record_policy(folder, kind) for kind in ("ppo", "cispo")],
            "distill": record_distill(),
        }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items()]
    Path(__file__).with_name("trl.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
