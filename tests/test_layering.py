"""The import graph is the architecture; this test is its only definition."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BASE = {"types", "params", "config", "compat", "engine_arguments", "errors", "log"}
# Layer -> what it may import of this repository; itself always. "api" is `from jaxengine import X`.
ALLOWED = {
    "errors": set(),
    "log": set(),
    "types": {"errors"},
    "params": {"compat", "errors", "log", "param_readers", "types"},
    "param_readers": {"errors", "types"},
    "compat": set(),
    "engine_arguments": {"compat"},
    "config": {"compat", "engine_arguments", "errors", "log", "types"},
    "utils": BASE,
    "gguf_header": BASE,
    "gguf_file": BASE | {"gguf_header"},
    "pallas_kernels": set(),
    "scheduler": BASE,
    "text": BASE | {"gguf_file"},
    "nn": BASE | {"pallas_kernels"},
    "sampling": BASE | {"pallas_kernels"},
    "models": BASE | {"nn"},
    "runtime": BASE
    | {
        "gguf_file",
        "pallas_kernels",
        "nn",
        "models",
        "sampling",
        "scheduler.buckets",
        "scheduler.plan",
    },
    "locate": BASE | {"gguf_file", "models"},
    "core": BASE | {"scheduler", "runtime"},
    "limits": BASE | {"runtime", "scheduler.buckets"},
    "build": BASE
    | {"core", "gguf_file", "limits", "locate", "models", "nn", "runtime", "sampling", "scheduler"},
    "defaults": BASE | {"locate"},
    "arguments": BASE,
    "generate_arguments": set(),
    "requests": BASE | {"arguments", "generate_arguments"},
    "call": BASE | {"channel"},
    "channel": BASE,
    "display": set(),
    "imap": BASE | {"call", "channel"},
    "progress": set(),
    "chat": BASE | {"generate_arguments"},
    "pooling": BASE | {"generate_arguments", "sampling"},
    "profiling": BASE,
    "sglang_names": BASE,
    "residency": BASE | {"core", "models", "runtime.runner", "worker"},
    "weight_sources": BASE | {"build", "locate", "models", "runtime.weights"},
    "hidden": BASE,
    "reports": BASE,
    "outputs": BASE | {"channel", "display", "hidden", "reports", "text"},
    "worker": BASE | {"channel", "core", "outputs", "text"},
    "in_flight": BASE,
    "sequence_factory": BASE | {"requests", "runtime.samplers", "text"},
    "submit": BASE
    | {
        "build",
        "call",
        "channel",
        "defaults",
        "hidden",
        "in_flight",
        "outputs",
        "requests",
        "runtime.samplers",
        "sampling",
        "sequence_factory",
        "text",
        "worker",
    },
    "engine": BASE
    | {
        "build",
        "generate_arguments",
        "locate",
        "call",
        "imap",
        "progress",
        "chat",
        "pooling",
        "profiling",
        "residency",
        "sampling",
        "sglang_names",
        "submit",
        "text",
        "weight_sources",
        "worker",
    },
    "serve": BASE
    | {
        "api",
        "build.convert",
        "chat",
        "locate",
        "progress",
        "requests.parse_call",
        "sampling",
        "text",
        "utils",
    },
    "bench": BASE | {"api", "models", "nn", "sampling", "utils"},
    "contrib": BASE | {"api", "sampling", "nn", "models"},
    "__init__": BASE | {"display", "engine", "sampling", "utils"},
}
HOST_ONLY = BASE | {
    "arguments",
    "param_readers",
    "call",
    "gguf_file",
    "channel",
    "display",
    "chat",
    "hidden",
    "imap",
    "outputs",
    "generate_arguments",
    "in_flight",
    "progress",
    "reports",
    "requests",
    "scheduler",
    "text",
    "utils",
}  # must start without an accelerator runtime
DEVICE_LIBS = {"flax", "jax", "jaxlib", "jaxtyping", "optax", "orbax", "pallas_kernels"}
KERNEL_LIBS = {"jax", "jax_triton", "jaxlib", "jaxtyping", "ml_dtypes", "numpy", "triton"}
MODULES = sorted([*ROOT.glob("jaxengine/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "pallas_kernels" else parts[1]


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def target_of(name: str) -> str | None:
    """What `name` is in the words of ALLOWED; None when it is not ours."""
    top, _, rest = name.partition(".")
    if top == "pallas_kernels":
        return top
    if top != "jaxengine":
        return None
    return rest if rest.split(".")[0] in ALLOWED else "api"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    layer = layer_of(path)
    assert layer in ALLOWED, f"{path}: say in ALLOWED what {layer!r} may import"
    for name in imported_names(path):
        top = name.split(".")[0]
        assert top != "torch", f"{path} imports torch"
        if layer in HOST_ONLY:
            assert top not in DEVICE_LIBS, f"{path} is host-only but imports {name}"
        if layer == "pallas_kernels" and top != layer:
            assert top in KERNEL_LIBS | set(sys.stdlib_module_names), f"{path} imports {name}"
        target = target_of(name)
        if target is None or target.split(".")[0] == layer:
            continue
        is_allowed = any(target == to or target.startswith(f"{to}.") for to in ALLOWED[layer])
        assert is_allowed, (
            f"{path}: {layer!r} may not import {name!r}, only {sorted(ALLOWED[layer])}"
        )


def run_python(code: str) -> str:
    """Runs code in a new interpreter and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("flax", "jax", "jaxlib", "optax", "orbax", "torch", "transformers")


def test_import_is_quick_and_light():
    code = "import sys, time; start = time.perf_counter(); import jaxengine; "
    code += "print(time.perf_counter() - start, *sys.modules)"
    runs = [run_python(code).split() for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    assert not {*HEAVY, "numpy"} & set(runs[0])


IMPORT_ALL = """
import importlib, pkgutil
def import_all(name):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("name", ["scheduler", "text"])
def test_host_packages_start_without_jax(name: str):
    code = f"{IMPORT_ALL}\nimport_all('jaxengine.{name}')\nimport sys\nprint(*sys.modules)"
    assert not {"flax", "jax", "jaxlib", "torch"} & set(run_python(code).split())


def test_import_changes_no_global_state():
    run_python(f"""
import asyncio, multiprocessing, os, signal, sys, threading, warnings
# What others change on import is not ours: Mosaic sets a variable for its own tools.
import jax, jax.experimental.pallas.mosaic_gpu, numpy, orbax.checkpoint, transformers
{IMPORT_ALL}
def snapshot():
    return dict(
        signals=[(number, signal.getsignal(number)) for number in signal.valid_signals()],
        loop_policy=asyncio.events._event_loop_policy,
        environment=dict(os.environ),
        jax_config=dict(jax.config.values),
        start_method=multiprocessing.get_start_method(allow_none=True),
        threads=threading.enumerate(),
        hooks=(sys.excepthook, threading.excepthook, sys.unraisablehook),
        warnings=list(warnings.filters),
    )
before = snapshot()
import_all("jaxengine")
after = snapshot()
assert after == before, [(k, before[k], after[k]) for k in before if before[k] != after[k]]
""")
