"""Set-up of the whole test run: device, shape checks at run time, and which markers apply."""

import fcntl
import importlib
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

LONG_FILES = frozenset(
    """
    test_batch_kill test_bench test_builtins test_interpreter test_notebooks test_parity test_ray
    test_samplers test_sglang_cells
    """.split()
)
"""They come first, so that the workers end together: each takes more than 15 s."""


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


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay together, for they share engines; notebooks share nothing."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebooks" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


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
        install_import_hook(checked_modules(), "tests.shapes.check_types")


def checked_modules() -> list[str]:
    """All of ours but what Triton compiles: that reads a function's source, not its wrapper's."""
    root = Path(__file__).parents[1]
    files = (path for top in ("jaxengine", "pallas_kernels") for path in (root / top).rglob("*.py"))
    modules = (".".join(path.relative_to(root).with_suffix("").parts) for path in files)
    # A package's name would stand for all that is in it.
    return [m for m in modules if not m.endswith((".__init__", ".kernel_language"))]


def pytest_collection_modifyitems(items: list[pytest.Item]):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    if has_cuda_plugin():
        return
    skip = pytest.mark.skip(reason="needs the CUDA plugin of jax: see .ci/run")
    for item in items:
        if item.get_closest_marker("deviceless"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of all engines of the run, whichever worker of pytest-xdist compiled them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "executables"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def compiled(*args: Any, cache_dir: str, **settings: Any) -> Any:
    """An engine with all its programs; workers wait for each other rather than compile twice."""
    import jaxengine  # not before the hook above

    with open(f"{cache_dir}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        engine = jaxengine.Engine(*args, cache_dir=cache_dir, **settings)
        engine.wait_until_compiled()
    return engine


@pytest.fixture(scope="session")
def demo_settings(cache_dir: Path) -> dict[str, Any]:
    """Settings of every engine over the demo model: any two of them share their executables."""
    from tests.engine.conftest import SETTINGS  # not before the hook above

    return {**SETTINGS, "max_total_tokens": 512, "cache_dir": str(cache_dir)}


@pytest.fixture(scope="session")
def demo(demo_settings: dict[str, Any]) -> Iterator[Any]:
    """An engine over the demo model."""
    import jaxengine  # not before the hook above
    from tests.engine.conftest import assert_idle

    with compiled(jaxengine.DEMO_MODEL, **demo_settings) as engine:
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model with a tokenizer as a folder, for processes of their own."""
    from tests.engine import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer=tokenizer)


@pytest.fixture(scope="session")
def engine(settings: dict[str, Any], tokenizer: Any) -> Iterator[Any]:
    """The tiny model with a tokenizer."""
    from tests.engine import tiny
    from tests.engine.conftest import assert_idle

    with compiled(**tiny.engine_arguments(), tokenizer=tokenizer, **settings) as engine:
        yield engine
        assert_idle(engine)
