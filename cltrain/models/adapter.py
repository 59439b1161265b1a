"""The adapter in memory, on disk (PEFT's format, safetensors only) and attached to the frozen base.

adapter_config.json is written by us, byte for byte the same everywhere; the base's digest travels as the safetensors
metadata `cltrain_base_digest`, the only key there because its order would not be fixed with two.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cltrain.errors import ConflictError, DataError
from cltrain.models.base import Base
from cltrain.models.digest import ADAPTER_FILES, adapter_digest
from cltrain.models.shapes import module_order, module_shapes, tensor_names

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module path (`model.layers.0.self_attn.q_proj`) -> (A_RK, B_NR); the module's delta is alpha / rank * B A."""

METADATA_KEY = "cltrain_base_digest"
_PLAIN = {  # what PEFT may do beyond plain LoRA, and the value that means "no"
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True)
class AdapterFile:
    """One LoRA adapter. `factors` are float32 on the CPU when read from or written to a file."""

    factors: Factors
    rank: int
    alpha: float
    targets: tuple[str, ...]  # sorted
    base_digest: str | None  # None: the file does not say (not written by cltrain)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def with_factors(self, factors: Factors) -> AdapterFile:
        return AdapterFile(factors, self.rank, self.alpha, self.targets, self.base_digest)


def new_factors(base: Base, rank: int, alpha: float, targets: Sequence[str], seed: int) -> AdapterFile:
    """A fresh adapter that changes nothing: A uniform in +-1/sqrt(K) by (seed, module), B = 0.

    Raises ConfigError for a target that the base does not have.
    """
    factors: Factors = {}
    for module, (num_out, num_in) in module_shapes(base.model.config.to_dict(), targets).items():
        key = hashlib.sha256(f"factors\0{seed}\0{module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        uniform = torch.rand((rank, num_in), generator=generator)
        factors[module] = ((2 * uniform - 1) / num_in**0.5, torch.zeros(num_out, rank))
    return AdapterFile(factors, rank, float(alpha), tuple(sorted(targets)), base.digest)


def attach(base: Base, adapter: AdapterFile) -> Any:
    """A fresh PeftModel over the base: its own modules and its own float32 factors, the base's frozen tensors shared.

    The factors (see `parameters_of`) require gradients, nothing else does. Raises DataError for another base's adapter.
    """
    from peft import LoraConfig, PeftModelForCausalLM

    check_fits(base, adapter)
    shared = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    model = copy.deepcopy(base.model, dict(shared))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type, unused-ignore]
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values that are replaced below
        peft_model = PeftModelForCausalLM(model, config, autocast_adapter_dtype=False)
    for module, (a_RK, b_NR) in adapter.factors.items():
        layer = model.get_submodule(module)
        for part, value in ((layer.lora_A, a_RK), (layer.lora_B, b_NR)):
            part["default"].weight = Parameter(value.detach().to(base.device, torch.float32, copy=True))
    return peft_model.eval()


def parameters_of(peft_model: Any, adapter: AdapterFile) -> dict[str, tuple[Parameter, Parameter]]:
    """The live factors of an attached adapter, in the adapter's order: writing to them changes the model."""
    model = peft_model.get_base_model()
    layers = {module: model.get_submodule(module) for module in adapter.factors}
    return {m: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for m, layer in layers.items()}


def set_factors(live: Mapping[str, tuple[Tensor, Tensor]], values: Factors) -> None:
    """Copy `values` into live factors of the same modules."""
    with torch.no_grad():
        for module, (a_RK, b_NR) in values.items():
            live[module][0].copy_(a_RK)
            live[module][1].copy_(b_NR)


def snapshot(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Factors:
    """A float32 copy on the CPU, detached from everything."""
    return {
        m: (a.detach().to("cpu", torch.float32, copy=True), b.detach().to("cpu", torch.float32, copy=True))
        for m, (a, b) in factors.items()
    }


def check_fits(base: Base, adapter: AdapterFile) -> None:
    """Raise DataError unless the adapter was made for this base and has exactly its modules and shapes."""
    if adapter.base_digest is not None and adapter.base_digest != base.digest:
        raise DataError(
            f"the adapter belongs to another base (sha256 {adapter.base_digest[:12]}; this one is {base.digest[:12]})"
        )
    shapes = module_shapes(base.model.config.to_dict(), adapter.targets)
    if shapes.keys() != adapter.factors.keys():
        odd = sorted(shapes.keys() ^ adapter.factors.keys())
        raise DataError(f"the adapter's modules are not those of {base.path}: {odd[0]} (and {len(odd) - 1} more)")
    for module, (num_out, num_in) in shapes.items():
        a_RK, b_NR = adapter.factors[module]
        if a_RK.shape != (adapter.rank, num_in) or b_NR.shape != (num_out, adapter.rank):
            raise DataError(
                f"{module}: factors {tuple(a_RK.shape)} and {tuple(b_NR.shape)} do not fit a {num_out} x {num_in} "
                f"matrix at rank {adapter.rank}"
            )


def write_adapter(directory: Path, adapter: AdapterFile) -> str:
    """Write the two adapter files (temporary directory, fsync, rename) and return their digest.

    An identical adapter already there is left alone. Raises ConflictError for a different one, DataError when a factor
    is not finite or the disk is full; then nothing is left behind.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for module, factors in snapshot(adapter.factors).items():
        for name, factor in zip(tensor_names(module), factors, strict=True):
            if not bool(torch.isfinite(factor).all()):
                raise DataError(f"refusing to write an adapter with NaN or infinity in {name}")
            tensors[name] = factor.contiguous()
    contents = (
        json.dumps(_peft_config(adapter), indent=2, sort_keys=True).encode() + b"\n",
        save(tensors, metadata={METADATA_KEY: adapter.base_digest or ""}),
    )
    temporary = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, content in zip(ADAPTER_FILES, contents, strict=True):
            _write_synced(temporary / name, content)
        sync_directory(temporary)
        digest = adapter_digest(temporary)
        if directory.exists():
            if adapter_digest(directory) != digest:
                raise ConflictError(f"{directory} already holds a different adapter")
        else:
            os.rename(temporary, directory)
            sync_directory(directory.parent)
    except OSError as error:
        raise DataError(f"cannot write the adapter to {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def read_adapter(directory: Path) -> AdapterFile:
    """Read a plain LoRA adapter. Raises DataError: missing or malformed files, pickle, anything beyond plain LoRA,
    tensors that do not match the stated rank, NaN or infinity."""
    from safetensors import SafetensorError, safe_open

    pickled = [p.name for suffix in ("bin", "pt", "pth", "pkl") for p in directory.glob(f"*.{suffix}")]
    if pickled:
        raise DataError(f"{directory} holds a pickle ({pickled[0]}), which may run code when read: refused")
    adapter_digest(directory)
    rank, alpha, targets = _read_peft_config(directory / ADAPTER_FILES[0])
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(directory / ADAPTER_FILES[1], framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensors[name] = file.get_tensor(name).to(torch.float32)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{directory / ADAPTER_FILES[1]} is not a safetensors file: {error}") from error
    factors = _pair(directory, tensors, rank)
    return AdapterFile(factors, rank, alpha, targets, metadata.get(METADATA_KEY) or None)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _peft_config(adapter: AdapterFile) -> dict[str, Any]:
    alpha = adapter.alpha
    return {
        **_PLAIN,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(adapter.targets),
        "task_type": "CAUSAL_LM",
    }


def _read_peft_config(file: Path) -> tuple[int, float, tuple[str, ...]]:
    try:
        config = json.loads(file.read_text())
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
        kind = config.get("peft_type", "LORA")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a LoRA config: {error!r}") from None
    if kind != "LORA" or rank < 1 or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise DataError(f"{file} is not a LoRA config with a rank and a list of target_modules")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None, [], {}, False):
            raise DataError(f"{file}: {key} = {config[key]!r} is beyond plain LoRA and would not be measured: refused")
    return rank, alpha, tuple(sorted(targets))


def _pair(directory: Path, tensors: dict[str, Tensor], rank: int) -> Factors:
    prefix, end = "base_model.model.", ".lora_A.weight"
    modules = sorted(
        (name[len(prefix) : -len(end)] for name in tensors if name.startswith(prefix) and name.endswith(end)),
        key=module_order,
    )
    expected = {name for module in modules for name in tensor_names(module)}
    if expected != tensors.keys() or not modules:
        raise DataError(
            f"{directory}: tensors that are no pairs of LoRA factors: {sorted(expected ^ tensors.keys())[:3]}"
        )
    factors: Factors = {}
    for module in modules:
        a_RK, b_NR = (tensors[name] for name in tensor_names(module))
        if a_RK.ndim != 2 or b_NR.ndim != 2 or a_RK.shape[0] != rank or b_NR.shape[1] != rank:
            raise DataError(
                f"{directory}: {module} has shapes {tuple(a_RK.shape)}, {tuple(b_NR.shape)}; rank is {rank}"
            )
        if not bool(torch.isfinite(a_RK).all() and torch.isfinite(b_NR).all()):
            raise DataError(f"{directory}: {module} holds NaN or infinity")
        factors[module] = (a_RK, b_NR)
    return factors
