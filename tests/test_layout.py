"""The promises that a reviewer would otherwise have to remember."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cltrain import config

REPO = Path(__file__).parent.parent
SKIPPED = {"build", "dist", "out", "wandb", "__pycache__"}
MAX_LINES = 400
TEXT = {".py", ".md", ".toml", ".txt", ".html", ".sh", ".yml", ".yaml", ".json", ".jinja", ""}
SOMEONES_DISK = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|tmp/w)/\w+|[A-Z]:\\Users\\")


def is_ours_to_skip(part: str) -> bool:
    return part in SKIPPED or part.endswith(".egg-info") or (part.startswith(".") and part not in {".ci", ".gitignore"})


def files(*suffixes: str) -> list[Path]:
    """Tracked files, plus those that are new and not ignored; in an export without git, every file."""
    if shutil.which("git") and (REPO / ".git").exists():
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout.split("\0")
        found = [REPO / name for name in names if name]
    else:
        found = [p for p in REPO.rglob("*") if not any(map(is_ours_to_skip, p.relative_to(REPO).parts))]
    return sorted(p for p in found if p.is_file() and (not suffixes or p.suffix in suffixes))


def test_kernels_folder_never_shadows_hugging_face_kernels() -> None:
    assert not (REPO / "kernels/__init__.py").exists()
    assert not list((REPO / "kernels").rglob("test_*.py")), "pytest would plant a fake `kernels` module"
    assert not list((REPO / "kernels").rglob("conftest.py"))
    assert not (REPO / "tests/kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(REPO))


def test_every_python_file_fits_one_sitting() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in files(".py")}
    long = {str(path.relative_to(REPO)): count for path, count in lines.items() if count > MAX_LINES}
    assert not long, f"split these (limit {MAX_LINES} lines): {long}"


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert config.load([path]).agent.name == "support"


def test_no_file_names_somebodys_disk() -> None:
    found = []
    for path in files():
        if path.suffix not in TEXT or path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(REPO)}:{i}" for i, line in enumerate(text.splitlines(), 1) if SOMEONES_DISK.search(line)
        ]
    assert not found


def test_every_todo_has_an_anchor() -> None:
    """A TODO names an issue, a version or an event in brackets: TODO(triton 4): ..."""
    loose = re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!\()")
    found = [
        f"{path.relative_to(REPO)}:{i}"
        for path in files(".py")
        if path != Path(__file__)
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if loose.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    "module",
    ["cltrain.cli", "cltrain.api", "cltrain.monitoring.report", "cltrain.monitoring.wandb_sink", "cltrain.gate",
     "cltrain.registry", "cltrain.store.database", "cltrain.experience", "cltrain.gateway"],
)  # fmt: skip
def test_light_parts_import_no_heavy_package(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'triton', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_layers_hold() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([str(tool), "--no-cache"], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_constraints_pin_everything_the_project_names() -> None:
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for group in project["optional-dependencies"].values() for r in group]
    pins = re.findall(r"^([a-z0-9-]+)==\S+$", (REPO / "constraints.txt").read_text(), re.M)
    names = {re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= set(pins), f"not in constraints.txt: {sorted(names - set(pins))}"
