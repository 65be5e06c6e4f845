"""Equal keys mean the same program: what is rebuilt is equal, what does something else is not."""

import dataclasses
import functools
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine.sampling as s
from jaxengine.sampling.identity import are_equal, digest_of, structure_of

ROOT = Path(__file__).parents[2]


def cell(source: str, **names: Any) -> dict[str, Any]:
    """Runs source as a notebook cell is run: in the globals of a module without a file."""
    scope = {"__name__": "__main__", "jnp": jnp, "np": np, **names}
    exec(source, scope)
    return scope


BUILTINS = [
    s.additive_penalties,
    s.allowed_tokens,
    s.bad_words,
    s.classifier_free_guidance,
    s.contrastive,
    s.default_sampler,
    s.dry,
    s.dynamic_temperature,
    s.epsilon,
    s.eta,
    s.forced_tokens,
    s.logit_bias,
    s.min_new_tokens,
    s.mirostat_v2,
    s.no_repeat_ngram,
    s.repetition_penalty,
    s.temperature,
    s.top_k_top_p_min_p,
    s.top_n_sigma,
    s.typical,
    s.watermark,
    s.xtc,
    lambda: s.thinking_budget(1, 2, 3),
]


def test_rebuilt_chains_are_equal_and_no_two_built_ins_are():
    keys = [structure_of(maker()) for maker in BUILTINS]
    assert keys == [structure_of(maker()) for maker in BUILTINS]
    assert len(set(keys)) == len(keys)


def test_arguments_and_order_count():
    a, b = s.temperature(), s.top_k_top_p_min_p()
    assert not are_equal(s.chain(a, b), s.chain(b, a))
    assert not are_equal(s.dry(max_window=8), s.dry(max_window=9))
    assert not are_equal(s.watermark(key=1), s.watermark(key=2))
    assert not are_equal(s.thinking_budget(1, 2, 3), s.thinking_budget(1, 2, 4))
    assert not are_equal(
        s.when(lambda ctx: ctx.position > 1, a), s.when(lambda ctx: ctx.position > 2, a)
    )


PAIRS: dict[str, Callable[[Any], Any]] = {
    "closure": lambda x: lambda logits, ctx: logits * x,
    "default": lambda x: eval("lambda logits, ctx, x=x: logits", {"x": x}),
    "keyword default": lambda x: eval("lambda logits, *, x=x: logits", {"x": x}),
    "constant": lambda x: eval(f"lambda logits, ctx: logits * {x}"),
    "nested constant": lambda x: eval(f"lambda logits, ctx: (lambda: logits * {x})()"),
    "partial": lambda x: functools.partial(jnp.multiply, x),
    "container": lambda x: {"a": [(x, None)]},
    "array": lambda x: np.full(3, x),
    "array of objects": lambda x: np.array([lambda: x], object),
    "set of functions": lambda x: frozenset([lambda: x]),
    "jitted": lambda x: jax.jit(lambda logits: logits * x),
    "attribute": lambda x: Scaled(x),
    "method": lambda x: Scaled(x).scale,
    "slice": lambda x: slice(0, x),
}


@dataclasses.dataclass
class Point:
    x: float


class Scaled:
    def __init__(self, by: float) -> None:
        self.by = by

    def scale(self, logits: Any, ctx: Any) -> Any:
        return logits * self.by


@pytest.mark.parametrize("kind", PAIRS)
def test_values_inside_count(kind: str):
    make = PAIRS[kind]
    assert structure_of(make(2.0)) == structure_of(make(2.0))
    assert structure_of(make(2.0)) != structure_of(make(3.0))
    assert structure_of(make(0.0)) != structure_of(make(-0.0))


def test_types_of_equal_values_count():
    different = [1, 1.0, True, np.int32(1), np.float32(1), np.ones((), np.int64), "1", Point(1)]
    assert len({structure_of(x) for x in different}) == len(different)


def test_a_changed_helper_changes_the_key():
    source = "def helper(x): return x * {}\ndef sampler(logits, ctx): return helper(logits)"
    one, same, other = (cell(source.format(n)) for n in (2, 2, 3))
    assert are_equal(one["sampler"], same["sampler"])
    assert not are_equal(one["sampler"], other["sampler"])
    before = structure_of(one["sampler"])
    exec("def helper(x): return x * 4", one)
    assert structure_of(one["sampler"]) != before


def test_a_changed_global_changes_the_key():
    scope = cell("scale = 2\nsampler = lambda logits, ctx: (lambda: logits * scale)()")
    before = structure_of(scope["sampler"])
    scope["scale"] = 3
    assert structure_of(scope["sampler"]) != before


def test_a_wrapper_counts_by_its_own_globals():
    source = "@functools.wraps(jnp.exp)\ndef sampler(logits, ctx): return logits * scale"
    a, b = (cell(source, functools=functools, scale=x)["sampler"] for x in (2, 3))
    assert a.__module__.startswith("jax")
    assert not are_equal(a, b)


def test_a_changed_attribute_or_method_changes_the_key():
    source = """
class Mine:
    def __init__(self): self.scale = 2
    def __call__(self, logits, ctx): return helper(logits) * self.scale
def helper(x): return x
mine = Mine()
"""
    scope = cell(source)
    before = structure_of(scope["mine"])
    assert structure_of(scope["mine"]) == before
    scope["mine"].scale = 3
    changed = structure_of(scope["mine"])
    assert changed != before
    exec("def helper(x): return -x", scope)
    assert structure_of(scope["mine"]) not in (before, changed)


def test_a_reloaded_checkout_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "my_checkout_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = "def helper(x): return x * {}\ndef sampler(logits, ctx): return helper(logits)\n"
    (package / "mine.py").write_text(source.format(2))
    module = importlib.import_module("my_checkout_for_tests.mine")
    sampler, before = module.sampler, structure_of(module.sampler)
    (package / "mine.py").write_text(source.format(33))
    importlib.reload(module)  # the module's globals are changed in place
    assert structure_of(sampler) != before


def test_recursion_ends():
    scope = cell("def a(n): return b(n)\ndef b(n): return a(n - 1) if n else SCALE", SCALE=1)
    same = cell("def a(n): return b(n)\ndef b(n): return a(n - 1) if n else SCALE", SCALE=1)
    other = cell("def a(n): return b(n)\ndef b(n): return a(n - 1) if n else SCALE", SCALE=2)
    assert are_equal(scope["a"], same["a"]) and not are_equal(scope["a"], other["a"])
    loop: list[Any] = [1]
    loop.append(loop)
    assert structure_of(loop) == structure_of(loop)


def test_an_identity_is_not_reused():
    big = 1 << 21  # too large to count by content
    keys = []
    for i in range(8):
        array = np.zeros(big, np.uint8) + i
        keys.append(structure_of(lambda logits, ctx, array=array: logits))
        del array
        gc.collect()
    assert len(set(keys)) == len(keys)


def test_device_arrays_count_by_identity():
    array = jnp.ones(3)
    assert structure_of([array]) == structure_of([array])
    assert structure_of([array]) != structure_of([jnp.ones(3)])


LASTING = """
import enum
import jax
import jax.numpy as jnp
import numpy as np
import jaxengine.sampling as s

class Mode(enum.Enum):
    SOFT = 1

def helper(x):
    return x if x.ndim in {1, 2, 3} or str(x.dtype) in {"a", "b", "c", "d"} else jnp.tanh(x)

def apply(logits, state, ctx):
    return helper(logits) + jax.lax.stop_gradient(ctx.arrays["w"]) * CONSTANT

CONSTANT = VALUE
SETTINGS = {"modes": {"x", "y", "z"}, "dtype": np.dtype("int8"), "mode": Mode.SOFT}
mine = s.LogitsTransform(
    lambda logits, state, ctx: apply(logits, state, SETTINGS), arrays={"w": jnp.arange(ITEMS)}
)
sampler = s.Sampler(s.chain(s.temperature(), s.top_k_top_p_min_p(), s.dry(), mine))
"""


def digest_with(value: float = 0.5, items: int = 3) -> str:
    """The digest of a sampler as a script makes it."""
    names = {"VALUE": value, "ITEMS": items, "__name__": "__main__"}
    exec(LASTING, names)
    return digest_of(names["sampler"])


def test_a_digest_is_the_same_in_every_process_and_counts_what_a_structure_does():
    code = f"VALUE, ITEMS = 0.5, 3\n{LASTING}\n"
    code += "from jaxengine.sampling.identity import digest_of\nprint(digest_of(sampler))"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert digest_with() == digest_with()
    assert len({digest_with(), digest_with(value=0.25), digest_with(items=4)}) == 3
