"""A release's certificate: every bound recomputed from its files, the base and the anchors, without our store.

Dense float64 arithmetic, written here a second time on purpose: nothing of what the trainer measures with has a part.
A manifest's limits are its own word; the owner's settings (`limits`) can be held against the release instead.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from cltrain.config import BoundsConfig
from cltrain.config_tenants import shared_of
from cltrain.errors import DataError
from cltrain.models.digest import ADAPTER_FILES, MANIFEST, SIGNATURE, adapter_digest, base_digest, base_path
from cltrain.records import BOUNDS, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

    from cltrain.models.adapter import AdapterFile
    from cltrain.models.base import Base

CLAIMED_ONLY = ("day_frobenius", "num_tokens", "num_steps")  # facts of the update that no file shows
NORM_TOLERANCE = (1e-6, 0.0)  # relative; absolute
# The claimed KL is of a forward in the base's dtype. Measured on the shipped base at 2e-4 to 4e-3 nats: 1e-8 off in
# float32, 2e-5 in bfloat16; larger vocabularies and other machines sum in another order.
KL_TOLERANCE = {"float32": (1e-4, 1e-6), "float16": (0.05, 2e-4), "bfloat16": (0.05, 2e-4)}


class Manifest(BaseModel):
    """What a release says of itself, as far as it can be checked."""

    agent: str
    number: int
    name: str
    digest: str
    parent: str
    parent_digest: str
    base: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    anchors: str
    files: dict[str, str]
    bounds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a certificate: what the files show beside what the manifest claims, and what is allowed."""

    name: str
    state: Literal["holds", "fails", "claimed", "unchecked"]
    seen: float | str | None
    claimed: float | str | None
    limit: float | None = None
    says: str = ""


@dataclass(frozen=True, slots=True)
class Certificate:
    release: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self.findings if finding.state in ("fails", "unchecked"))

    @property
    def holds(self) -> bool:
        return not self.failed


def certify(
    directory: Path,
    *,
    base_dir: Path | None = None,
    anchors: Path | None = None,
    parent: Path | None = None,
    limits: BoundsConfig | None = None,
) -> Certificate:
    """Check a release's directory: hashes, name, base, anchors and parent, and where all are right each distance.

    `base_dir` None is the shipped base, `parent` the directory of that name beside this one, `anchors` the pinned file
    of the state directory around it, `limits` those that the manifest states. Raises DataError where there is nothing
    to check: no manifest, no adapter, no base.
    """
    directory = directory.resolve()
    manifest = _read_manifest(directory)
    allowed = _limits(manifest, limits)
    base_dir = base_path(base_dir)
    state_dir = directory.parent.parent.parent  # of releases/<agent>/<name>
    anchors = anchors or state_dir / "anchors" / f"{manifest.base[:12]}-{manifest.anchors[:12]}.jsonl"
    is_bare = manifest.parent_digest == manifest.base and parent is None
    is_own = manifest.parent.startswith(f"{manifest.agent}-v")  # a tenant's first one comes from the shared agent
    beside = directory.parent if is_own else directory.parent.parent / shared_of(manifest.agent)
    parent = None if is_bare else parent or beside / manifest.parent
    findings = [
        *_sealed(directory, manifest),
        _same("base", base_digest(base_dir), manifest.base, f"{base_dir} is another base: --base names the right one"),
        _anchors(anchors, manifest),
        _parent(parent, manifest),
    ]
    if all(finding.state == "holds" for finding in findings):
        seen = _distances_of(directory, base_dir, anchors, parent, manifest.dtype)
        findings += [
            _distance(name, value, manifest.bounds[name], allowed[name], _tolerance(name, manifest.dtype))
            for name, value in seen.items()
        ]
    else:
        says = "not computed: the files above are not those of the manifest"
        findings += [
            Finding(name, "unchecked", None, manifest.bounds[name], allowed[name], says)
            for name in BOUNDS
            if name not in CLAIMED_ONLY
        ]
    findings += [_claim(name, manifest.bounds[name], allowed[name]) for name in CLAIMED_ONLY]
    return Certificate(manifest.name, tuple(findings))


def distances(
    base: Base, adapter: AdapterFile, parent: AdapterFile | None, rows: Sequence[TokenRow]
) -> dict[str, float]:
    """Every measured bound in float64, each delta formed as a whole matrix; `parent` None is the bare base. Raises
    DataError for a delta that is not finite.

    KL is the mean over the predicted tokens of `rows`, nats, over the whole vocabulary, by a float64 copy of the model
    with the deltas added to its weights (transformers keeps RMSNorm and rotary tables in float32).
    """
    import torch

    largest = dict.fromkeys(("step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral"), 0.0)
    for module in dict.fromkeys([*adapter.factors, *(parent.factors if parent else ())]):
        weight_NK = base.model.get_submodule(module).weight.double().cpu()
        delta_NK, before_NK = (_delta(one, module, weight_NK) for one in (adapter, parent))
        length = float(weight_NK.square().sum().sqrt())
        for kind, moved_NK in (("step", delta_NK - before_NK), ("drift", delta_NK)):
            if not bool(torch.isfinite(moved_NK).all()):
                raise DataError(f"{module}: the delta is not finite: its factors or lora_alpha are not numbers")
            frobenius = float(moved_NK.square().sum().sqrt())
            spectral = float(torch.linalg.svdvals(moved_NK)[0])
            for norm, value in ((f"{kind}_frobenius", frobenius), (f"{kind}_spectral", spectral)):
                largest[norm] = max(largest[norm], _over(value, length))
    return {**largest, **_kls(base, adapter, parent, rows)}


def table(certificate: Certificate) -> list[str]:
    """The certificate for a terminal: a line each, and why where something does not hold."""
    lines = [f"{'':<26} {'seen':>12} {'claimed':>12} {'limit':>10}"]
    if "base" in certificate.failed:
        lines.insert(0, f"{certificate.release} is of another base than the one looked at: name it with --base")
    for finding in certificate.findings:
        seen, claimed, limit = (_shown(value) for value in (finding.seen, finding.claimed, finding.limit))
        says = f": {finding.says}" if finding.says else ""
        lines.append(f"{finding.name:<26} {seen:>12} {claimed:>12} {limit:>10}  {finding.state}{says}")
    verdict = "holds" if certificate.holds else f"does not hold: {', '.join(certificate.failed)}"
    return [*lines, f"{certificate.release} {verdict}"]


# ---------------------------------------------------------------- files


def _read_manifest(directory: Path) -> Manifest:
    file = directory / MANIFEST
    try:
        manifest = Manifest.model_validate(json.loads(file.read_bytes()), strict=True)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): give the directory of a release") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file} is not a release's manifest: {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    claims = [name for bound in BOUNDS for name in (bound, f"{bound}_limit")]
    if missing := [name for name in claims if name not in manifest.bounds]:
        raise DataError(f"{file} does not claim {', '.join(missing)}")
    paths = [*manifest.files, manifest.parent]
    if outside := [name for name in paths if Path(name).name != name]:
        raise DataError(f"{file} names {outside[0]!r}, which is no plain name")
    return manifest


def _sealed(directory: Path, manifest: Manifest) -> list[Finding]:
    """The files against their hashes, and the name against the content."""
    present = {path.name for path in directory.iterdir()} - {MANIFEST, SIGNATURE, *ADAPTER_FILES, *manifest.files}
    strays = [Finding(name, "fails", None, None, says="the manifest does not list it") for name in sorted(present)]
    digest = adapter_digest(directory)
    name = f"{manifest.agent}-v{manifest.number:06d}-{digest[:12]}"
    odd = f"the content is named {name}"
    names = [_same("name", directory.name, manifest.name, "the directory has another name")]
    if names[0].state == "holds":
        names = [_same("name", name, manifest.name, odd)]
    listed = {**dict.fromkeys(ADAPTER_FILES, ""), **manifest.files}
    files = [
        _same(file, _sha256(directory / file), sha256, "not the file that was sealed")
        for file, sha256 in listed.items()
    ]
    return [*names, *files, *strays, _same("digest", digest, manifest.digest, "not the adapter that was sealed")]


def _anchors(file: Path, manifest: Manifest) -> Finding:
    says = "not the anchors that it was measured on" if file.is_file() else f"{file} is missing: --anchors names it"
    return _same("anchors", _sha256(file), manifest.anchors, says)


def _parent(directory: Path | None, manifest: Manifest) -> Finding:
    if directory is None:
        expected = f"{manifest.agent}-v000000-{manifest.base[:12]}"
        return _same("parent", expected, manifest.parent, "its parent's digest is that of the base")
    if not directory.is_dir():
        return Finding("parent", "fails", None, manifest.parent, says=f"{directory} is missing: --parent names it")
    seen = adapter_digest(directory)
    if not manifest.parent.endswith(f"-{manifest.parent_digest[:12]}"):
        return Finding("parent", "fails", manifest.parent_digest, manifest.parent, says="its name has another digest")
    return _same("parent", seen, manifest.parent_digest, f"{directory} is not the adapter that it was trained from")


def _same(name: str, seen: str | None, claimed: str, says: str) -> Finding:
    return (
        Finding(name, "holds", seen, claimed) if seen == claimed else Finding(name, "fails", seen, claimed, says=says)
    )


def _sha256(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


# ---------------------------------------------------------------- numbers


def _limits(manifest: Manifest, limits: BoundsConfig | None) -> dict[str, float]:
    if limits is None:
        return {name: manifest.bounds[f"{name}_limit"] for name in BOUNDS}
    named = {"num_tokens": limits.max_tokens, "num_steps": limits.max_steps}
    return {name: named[name] if name in named else getattr(limits, name) for name in BOUNDS}


def _tolerance(name: str, dtype: str) -> tuple[float, float]:
    return KL_TOLERANCE[dtype] if name.endswith("_kl") else NORM_TOLERANCE


def _distance(name: str, seen: float, claimed: float, limit: float, tolerance: tuple[float, float]) -> Finding:
    relative, absolute = tolerance
    slack = relative * abs(seen) + absolute
    if not abs(seen - claimed) <= slack:
        return Finding(
            name, "fails", seen, claimed, limit, f"the manifest claims {claimed:.9g}, the files show {seen:.9g}"
        )
    if not seen <= limit + slack:
        return Finding(name, "fails", seen, claimed, limit, f"{seen:.9g} is beyond the limit {limit:.9g}")
    return Finding(name, "holds", seen, claimed, limit)


def _claim(name: str, claimed: float, limit: float) -> Finding:
    if claimed < 0:
        return Finding(name, "fails", None, claimed, limit, f"{claimed:.9g} is no amount")
    if claimed <= limit:
        return Finding(name, "claimed", None, claimed, limit)
    return Finding(name, "fails", None, claimed, limit, f"{claimed:.9g} is beyond the limit {limit:.9g}")


def _distances_of(directory: Path, base_dir: Path, anchors: Path, parent: Path | None, dtype: str) -> dict[str, float]:
    import torch

    from cltrain.models.adapter import check_fits, read_adapter
    from cltrain.models.anchors import read_rows
    from cltrain.models.base import load_base

    base = load_base(base_dir, dtype=dtype, num_threads=torch.get_num_threads())
    try:
        adapter, before = read_adapter(directory), None if parent is None else read_adapter(parent)
        rows = read_rows(anchors.read_bytes())
    except (ValueError, LookupError, TypeError, RecursionError) as error:  # the hashes are right, whoever wrote it
        raise DataError(f"what was sealed is no adapter, or these are no anchors: {error}") from None
    for one in (adapter, before):
        if one is not None:
            check_fits(base, one)
    return distances(base, adapter, before, rows)


def _delta(adapter: AdapterFile | None, module: str, like_NK: Tensor) -> Tensor:
    """alpha / rank * B A as a whole float64 matrix; zeros where the adapter has no such module."""
    import torch

    if adapter is None or module not in adapter.factors:
        return torch.zeros_like(like_NK)
    a_RK, b_NR = adapter.factors[module]
    return (adapter.alpha / adapter.rank) * (b_NR.double() @ a_RK.double())


def _over(value: float, length: float) -> float:
    if length > 0:
        return value / length
    return float("inf") if value > 0 else 0.0


def _kls(base: Base, adapter: AdapterFile, parent: AdapterFile | None, rows: Sequence[TokenRow]) -> dict[str, float]:
    import torch

    model = copy.deepcopy(base.model).cpu().double()
    modules = dict.fromkeys([*adapter.factors, *(parent.factors if parent else ())])
    hidden: list[list[Tensor]] = []  # hidden_MD per row of the base, the parent and the adapter
    with torch.no_grad():
        for one in (None, parent, adapter):
            for module in modules:
                weight_NK = base.model.get_submodule(module).weight.double().cpu()
                model.get_submodule(module).weight.copy_(weight_NK + _delta(one, module, weight_NK))
            hidden.append([_hidden(model, row) for row in rows])
        step, drift, num_tokens = 0.0, 0.0, 0
        head = model.get_output_embeddings()
        for three in zip(*hidden, strict=True):
            of_base, of_parent, of_adapter = (torch.log_softmax(head(hidden_MD), dim=-1) for hidden_MD in three)
            drift += float((of_base.exp() * (of_base - of_adapter)).sum())
            step += float((of_parent.exp() * (of_parent - of_adapter)).sum())
            num_tokens += len(of_base)
    if num_tokens == 0:
        raise DataError("the anchors have no token to measure a KL on")
    return {"step_kl": step / num_tokens, "drift_kl": drift / num_tokens}


def _hidden(model: Any, row: TokenRow) -> Tensor:
    """What the row's weighted tokens are predicted from, hidden_MD; the row alone, so nothing is padded."""
    import torch

    places = [t - 1 for t, weight in enumerate(row.weights) if t > 0 and weight > 0]
    hidden_MD: Tensor = model.model(input_ids=torch.tensor([row.ids]), use_cache=False).last_hidden_state[0, places]
    return hidden_MD


def _shown(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value[:12] if isinstance(value, str) else f"{value:.6g}"
