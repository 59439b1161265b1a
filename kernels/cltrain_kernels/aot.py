"""How a kernel is compiled ahead of time, on a machine without a GPU: `kernels/bench/aot.py` reads the resources.

Each `<op>_triton.py` has `def compilations() -> list[Compilation]` with one entry for each form of a kernel that
training really launches: its dtypes, block sizes, warps and stages, at the sizes that use the most registers and
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One form of a kernel: `signature` names the type of each run-time argument ("*bf16", "*i64", "fp32", "i32").

    `divisible` are the arguments (pointers, sizes, strides) that are multiples of 16 in every launch that matters:
    without them loads become scalar and the table lies.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        """The row in the table: the kernel, its pointers' dtypes, its constants and its warps."""
        dtypes = sorted({kind[1:] for kind in self.signature.values() if kind.startswith("*")})
        constants = [f"{key}={value}" for key, value in sorted(self.constexprs.items())]
        return f"{self.kernel.__name__}({', '.join([*dtypes, *constants, f'num_warps={self.num_warps}'])})"
