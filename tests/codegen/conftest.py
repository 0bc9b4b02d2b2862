from __future__ import annotations

import pytest
from compiled_kernels import Kernel, compile_all


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return compile_all(tmp_path_factory.mktemp("codegen"))
