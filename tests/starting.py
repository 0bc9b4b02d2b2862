"""How tests start processes that compute: from one that has imported torch once for all."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

# On macOS a process that has torch's frameworks cannot be forked.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"

# Of no effect where the server runs already: children import what they miss.
multiprocessing.set_forkserver_preload(
    [
        *("hypothesis", "pytest"),
        *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    ]
)


def run(work: Callable[..., None], *args: Any, seconds: float = 120) -> int | None:
    """Run work(*args) in a process; return how it ended, None for hanging."""
    process = multiprocessing.get_context(METHOD).Process(target=work, args=args)
    process.start()
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code


_LOADED = """
import sys, normkit
print(*sys.modules)
import normkit._bench, normkit._serving.triton
print(*sys.modules)
"""


@cache
def loaded() -> tuple[frozenset[str], frozenset[str]]:
    """Modules that are there after `import normkit`, and after two of its own that load others."""
    told = subprocess.check_output([sys.executable, "-c", _LOADED], text=True)
    first, second = (frozenset(line.split()) for line in told.splitlines())
    assert "normkit.functional" in first
    assert "normkit._bench" in second
    return first, second
