"""Set-up of the whole test run: device, shape checks at run time, and which markers apply."""

import importlib
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def asks_for(config: pytest.Config, marker: str) -> bool:
    """Whether the `-m` expression selects tests with this marker."""
    expression = str(config.getoption("markexpr"))
    return marker in expression and f"not {marker}" not in expression


def has_cuda_plugin() -> bool:
    """Whether this run also looks at what is compiled for a GPU."""
    return bool(find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Tracing keeps one core busy, so a few at a time; a GPU has room for one."""
    return 0 if asks_for(config, "gpu") else min(4, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config):
    # A shell's background jobs start with interrupts ignored, and tests send some.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before jax is first imported; only a run that asks for it (`-m gpu`) touches a GPU.
    if not asks_for(config, "gpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if not has_cuda_plugin():  # tests compile much and run little
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    # Nothing here may reach a model hub, but for the tests that say so.
    if not asks_for(config, "network"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if find_spec("beartype"):
        from jaxtyping import install_import_hook

        importlib.import_module("tests.shapes")  # the hook itself imports `tests` only
        install_import_hook(["jaxengine", "pallas_kernels"], "tests.shapes.check_types")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    if has_cuda_plugin():
        return
    skip = pytest.mark.skip(reason="needs the CUDA plugin of jax: see .ci/run")
    for item in items:
        if item.get_closest_marker("deviceless"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of all engines of the run."""
    folder = tmp_path_factory.mktemp("executables")
    folder.chmod(0o700)
    return folder


@pytest.fixture(scope="session")
def demo_settings(cache_dir: Path) -> dict[str, Any]:
    """Settings of every engine over the demo model: any two of them share their executables."""
    from tests.engine.conftest import SETTINGS  # not before the hook above

    return {**SETTINGS, "max_total_tokens": 512, "cache_dir": str(cache_dir)}


@pytest.fixture(scope="session")
def demo(demo_settings: dict[str, Any]) -> Iterator[Any]:
    """An engine over the demo model."""
    import jaxengine
    from tests.engine.conftest import assert_idle

    with jaxengine.Engine(model_path=jaxengine.DEMO_MODEL, **demo_settings) as engine:
        engine.wait_until_compiled()
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="session")
def settings(cache_dir: Path) -> dict[str, Any]:
    """Settings of every tiny engine: any two of them share their executables."""
    from tests.engine.conftest import POOL_TOKENS, SETTINGS

    return {**SETTINGS, "max_total_tokens": POOL_TOKENS, "cache_dir": str(cache_dir)}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Of the tiny model."""
    from tests.text.tokenizers_for_tests import byte_level

    return byte_level()


@pytest.fixture(scope="session")
def engine(settings: dict[str, Any], tokenizer: Any) -> Iterator[Any]:
    """The tiny model with a tokenizer."""
    import jaxengine
    from tests.engine import tiny
    from tests.engine.conftest import assert_idle

    with jaxengine.Engine(**tiny.engine_arguments(), tokenizer=tokenizer, **settings) as engine:
        engine.wait_until_compiled()
        yield engine
        assert_idle(engine)
