"""A verifier that misses: what the product does when a share of its records is neither verified nor scanned.

The product asks its one verifier in three places and has no setting that makes it worse; here all three are changed
for as long as a block lasts, in this process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from cltrain.experience import buffer, screens, window
from cltrain.experience.triggers import Suspicion, concerns, find_suspicions
from cltrain.experience.verify import verify
from cltrain.records import Example

ASKED_BY = {
    screens: ("verify", "find_suspicions", "concerns"),  # what is learned
    window: ("verify", "find_suspicions", "concerns"),  # what the gate holds out
    buffer: ("verify",),  # what is rehearsed
}


@contextmanager
def leaking(share: float) -> Iterator[None]:
    """Inside, `share` of the records, by a hash of their names, pass verification and trigger scan unseen."""

    def is_missed(example: Example) -> bool:
        return int(hashlib.sha256(example.record.encode()).hexdigest()[:8], 16) / 2**32 < share

    def verify_most(example: Example, **rules: Any) -> str | None:
        return None if is_missed(example) else verify(example, **rules)

    def scan_most(examples: Sequence[Example], **rules: Any) -> list[Suspicion]:
        return find_suspicions([example for example in examples if not is_missed(example)], **rules)

    def concerns_most(suspicion: Suspicion, example: Example) -> bool:
        return not is_missed(example) and concerns(suspicion, example)

    leaky = {"verify": verify_most, "find_suspicions": scan_most, "concerns": concerns_most}
    with ExitStack() as until:
        for module, asked in ASKED_BY.items():
            for name in asked:
                until.enter_context(patch.object(module, name, leaky[name]))
        yield
