"""`check` passes what keeps its promises, and names what does not and why."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine.sampling as s
from jaxengine.errors import SamplerError
from jaxengine.sampling import LogitsTransform
from tests.sampling.test_builtins import EVERYTHING


def test_built_in_samplers_pass():
    s.check(
        s.chain(
            s.dry(max_window=16),
            s.thinking_budget(1, 2, 3, prompt_window=16),
            s.watermark(),
            s.dynamic_temperature(),
            s.xtc(),
            s.mirostat_v2(),
        )
    )


@pytest.mark.nightly
def test_all_built_in_samplers_pass():
    s.check(EVERYTHING)


def test_a_function_a_draw_and_a_sampler_pass():
    s.check(lambda logits, ctx: jnp.argmax(logits + ctx.temperature[:, None], axis=-1))
    s.check(s.Draw(lambda logits, state, ctx: (logits.argmax(-1), {"top": logits.max(-1)})))
    s.check(s.Sampler(s.per_row(LogitsTransform(lambda x, state, ctx: x - x.max()))))


kept: list[Any] = []
rng = np.random.default_rng(0)
BAD: dict[str, tuple[Any, str]] = {}


def bad(message: str) -> Callable[[Callable[[], Any]], None]:
    def add(maker: Callable[[], Any]) -> None:
        BAD[maker.__name__] = (maker, message)

    return add


@bad(r"`shrinks` must return the logits as float32\[5,97\], but returned float32\[5,96\]")
def shrinks():
    return LogitsTransform(lambda logits, state, ctx: logits[:, 1:])


@bad(r"`casts` must return the logits as float32\[5,97\], but returned bfloat16\[5,97\]")
def casts():
    return LogitsTransform(lambda logits, state, ctx: logits.astype(jnp.bfloat16))


@bad(r"`forgets` must return the logits as float32\[5,97\], but returned NoneType")
def forgets():
    nothing: Any = None
    return LogitsTransform(lambda logits, state, ctx: nothing)


@bad(r"ValueError, raised by `raises`, a part of the sampler: no such luck")
def raises():
    def apply(logits: Any, state: Any, ctx: Any) -> Any:
        raise ValueError("no such luck")

    return s.chain(s.temperature(), LogitsTransform(apply))


@bad(r"raised by `looks`, .* It looks at values on the host")
def looks():
    def apply(logits: Any, state: Any, ctx: Any) -> Any:
        return logits if ctx.temperature[0] > 0 else -logits

    return s.chain(s.temperature(), LogitsTransform(apply))


@bad(r"raised by `converts`, .* It looks at values on the host")
def converts():
    return LogitsTransform(lambda logits, state, ctx: jnp.asarray(np.sort(logits)))


@bad(r"`leaks` leaks a tracer")
def leaks():
    def apply(logits: Any, state: Any, ctx: Any) -> Any:
        kept.append(logits.max())
        return logits

    return LogitsTransform(apply)


@bad(r"`is_impure` is not pure")
def is_impure():
    return LogitsTransform(lambda logits, state, ctx: logits + rng.normal(size=logits.shape[1:]))


@bad(r"`mixes` mixes rows")
def mixes():
    return LogitsTransform(lambda logits, state, ctx: logits.at[0].multiply(-1))


@bad(r"`averages` let an inactive row change others")
def averages():
    return LogitsTransform(lambda logits, state, ctx: logits + 0 * logits.mean(axis=0))


@bad(r"`has_one_state` must return its state with a leading axis of 5 rows")
def has_one_state():
    return LogitsTransform(lambda logits, state, ctx: logits, init=lambda ctx: jnp.zeros(()))


@bad(r"`changes_state` must return its state as float32\[5\], but returned int32\[5\]")
def changes_state():
    return LogitsTransform(
        lambda logits, state, ctx: logits,
        init=lambda ctx: jnp.zeros(ctx.position.shape),
        update=lambda state, drawn, ctx: drawn.token,
    )


@bad(r"`draws_floats` must return a token for each row as int32\[5\], but returned float32\[5\]")
def draws_floats():
    return s.Draw(lambda logits, state, ctx: logits.max(axis=-1))


@bad(r"`draws_one` must return a token for each row as int32\[5\], but returned int32\[\]")
def draws_one():
    return lambda logits, ctx: jnp.argmax(logits)


@bad(r"`captures_all` must return the capture `x` with a leading axis of 5 rows")
def captures_all():
    return s.Sampler(s.chain(), capture={"x": lambda logits, drawn, ctx: drawn.logprob.mean()})


@bad(r"the sampling context has no `heat`")
def asks_for_more():
    return LogitsTransform(lambda logits, state, ctx: logits * ctx.heat)


@pytest.mark.parametrize("name", BAD)
def test_a_broken_promise_is_named(name: str):
    maker, message = BAD[name]
    with pytest.raises(SamplerError, match=message):
        s.check(maker())


def test_a_bad_request_is_named():
    with pytest.raises(SamplerError, match=r"`temperature` must be a non-negative finite number"):
        s.check(s.temperature(), [{"temperature": -1.0}])


def test_a_note_is_added_once_and_the_error_kept():
    def fails(logits: Any, ctx: Any) -> Any:
        raise ZeroDivisionError("by zero")

    with pytest.raises(SamplerError) as caught:
        s.check(fails)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    notes = [note for note in caught.value.__cause__.__notes__ if "raised by" in note]
    assert len(notes) == 1
    assert not jax.config.jax_check_tracer_leaks
