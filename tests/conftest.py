"""Settings and fixtures of all tests."""

import os
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings

import tiny_qmoe_mlx  # noqa: F401 (before MLX, whichever test module comes first: with numpy's BLAS under it)

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a Mac too, tests compute on the CPU, unless they are marked `metal`."""
    if sys.platform != "darwin" or request.node.get_closest_marker("metal"):
        yield
        return
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs Metal where there is none; MLX is imported only if a test asks."""
    marked = [item for item in items if item.get_closest_marker("metal")]
    if marked:
        import mlx.core as mx

        if not mx.metal.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no Metal device"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children take Ctrl-C even where pytest itself was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
