"""Shared fixtures: eight simulated CPU devices, and the real data where it is present."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Programs of a test are compiled more often than they run: spend little on optimising them. Without the fusion emitters
# a train step compiles in a third of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
# torch's threads wait for each other by spinning: for tiny models they cost far more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kill-points", type=int, default=1, help="random moments at which the tests kill a run or a conversion"
    )


@pytest.fixture(scope="session", autouse=True)
def transformers_in_this_process() -> Iterator[None]:
    """Conversions compare logits without a child, which takes seconds to import torch; test_parity starts one."""
    from convert import transformers_side

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_side, "logits_of_child", transformers_side.transformers_logits)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real corpora, benchmarks and tokenizers; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PANDA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set PANDA_SHARED_DATA")
    return folder
