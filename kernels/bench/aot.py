"""Compile every kernel for GPUs that this machine does not have, and hold what it needs against the committed table.

    python kernels/bench/aot.py [--op OP ...] [--architecture 90 ...] [--write]

Without --write it compares with `aot.json` beside this file and exits with 1 on a regression: a spill, too many
registers, more shared memory than the architecture has, or more of anything than the table says. The table is only
compared with the Triton version that wrote it; the limits hold for every version.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
PACKAGE = Path(__file__).parent.parent / "cltrain_kernels"
MAX_REGISTERS = 255
MAX_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may ask for
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.M)
TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA")

Resources = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", nargs="*", choices=ops(), default=ops(), help="only these ops")
    parser.add_argument("--architecture", nargs="*", type=int, choices=MAX_SHARED, default=list(MAX_SHARED))
    parser.add_argument("--write", action="store_true", help="replace these rows of the table")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(PACKAGE.parent))
    import triton

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if table.get("triton") != triton.__version__ and not args.write:
        print(f"the table is of triton {table.get('triton')}, this is {triton.__version__}: only limits are checked")
        table = {}
    known = table.get("rows", {})
    rows = measure(args.op, args.architecture)
    bad = [problem for key, row in rows.items() for problem in broken_limits(key, row)]
    if args.write:
        kept = {key: row for key, row in known.items() if not is_measured(key, args.op, args.architecture)}
        write(triton.__version__, kept | rows)
    elif table:
        bad += regressions(rows, {k: v for k, v in known.items() if is_measured(k, args.op, args.architecture)})
    for problem in bad:
        print(f"REGRESSION: {problem}")
    return 1 if bad else 0


def ops() -> list[str]:
    return sorted(path.name.removesuffix("_triton.py") for path in PACKAGE.glob("*_triton.py"))


def is_measured(key: str, ops: Sequence[str], architectures: Sequence[int]) -> bool:
    op, architecture = re.match(r"(\w+)/sm_(\d+)", key).groups()  # type: ignore[union-attr]
    return op in ops and int(architecture) in architectures


def measure(ops: Sequence[str], architectures: Sequence[int]) -> dict[str, Resources]:
    rows = {}
    for op in ops:
        for compilation in importlib.import_module(f"cltrain_kernels.{op}_triton").compilations():
            for architecture in architectures:
                key = f"{op}/sm_{architecture}/{compilation.name}"
                assert key not in rows, f"two compilations are called {key}"
                rows[key] = compiled(compilation, architecture)
                print(key, json.dumps(rows[key]), flush=True)
    return rows


def compiled(compilation: Any, architecture: int) -> Resources:
    """What the machine code of one kernel needs. Bytes are bytes; `local` counts instructions that reach spilled
    memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    source = ASTSource(
        fn=compilation.kernel,
        signature={name: compilation.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in compilation.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = ask("cuobjdump", "--dump-resource-usage", str(cubin))
        opcodes = Counter(OPCODE.findall(ask("nvdisasm", str(cubin))))
    assert opcodes, f"{compilation.name}: the disassembler printed no instruction that this script can read"
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        "local": opcodes["LDL"] + opcodes["STL"],
        "shared": result.metadata.shared,
        "tensor": {name: count for name, count in sorted(opcodes.items()) if TENSOR.fullmatch(name)},
    }


def ask(tool: str, *arguments: str) -> str:
    """What one of the CUDA tools inside the Triton wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


def broken_limits(key: str, row: Resources) -> list[str]:
    """Where one kernel cannot run well on its architecture, whatever the table says."""
    limit = MAX_SHARED[int(key.split("/")[1].removeprefix("sm_"))]
    found = []
    if row["registers"] > MAX_REGISTERS:
        found.append(f"{key}: {row['registers']} registers of {MAX_REGISTERS}")
    if row["stack"] or row["local"]:
        found.append(f"{key}: spills ({row['stack']} bytes of stack, {row['local']} loads and stores of local memory)")
    if row["shared"] > limit:
        found.append(f"{key}: {row['shared']} bytes of shared memory of {limit}")
    return found


def regressions(rows: Mapping[str, Resources], known: Mapping[str, Resources]) -> list[str]:
    """Where a kernel needs more than its row in the table, has lost tensor-core instructions, or has no row."""
    found = [f"{key}: in the table, but no longer compiled; run with --write" for key in known if key not in rows]
    for key, row in rows.items():
        if key not in known:
            found.append(f"{key}: not in the table; run with --write")
            continue
        for what in ("registers", "shared"):
            if row[what] > known[key][what]:
                found.append(f"{key}: {what} {known[key][what]} -> {row[what]}")
        found += [f"{key}: {name} is gone" for name in known[key]["tensor"] if name not in row["tensor"]]
    return found


def write(version: str, rows: Mapping[str, Resources]) -> None:
    """One row per line, sorted, so that two branches that add kernels merge."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    TABLE.write_text(f'{{\n "triton": {json.dumps(version)},\n "rows": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
