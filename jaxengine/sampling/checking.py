"""Tries a sampler on arrays, without an engine, for what the engine takes for granted.

    jaxengine.sampling.check(my_transform())

Each check is a promise of `LogitsTransform` or `Draw`; the error says which was broken and by what.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxengine.errors import SamplerError
from jaxengine.sampling.context import SamplingContext, row_keys
from jaxengine.sampling.contract import name_of
from jaxengine.sampling.draw import Draw
from jaxengine.sampling.logprobs import Wants
from jaxengine.sampling.sampler import Sample, Sampler, SamplerState, as_sampler, init_state, sample
from jaxengine.sampling.transforms import LogitsTransform
from jaxengine.types import Param

NUM_ROWS, NUM_STEPS, HIDDEN_SIZE = 5, 4, 8


class Trial(NamedTuple):
    """A few steps to run a sampler on.

    Attributes:
      ctx: The rows at their first step.
      logits: Of the model, at every step.
    """

    ctx: SamplingContext
    logits: Float[Array, "steps B V"]


def check(
    value: Any,
    requests: Sequence[Mapping[str, Any]] | None = None,
    vocab_size: int = 97,
    tokenizer: Any = None,
) -> None:
    """Checks that a transform, draw, sampler or function does what the engine relies on.

    It keeps shapes, dtypes and the structure of its state; it is pure and leaks no tracer; and it
    treats each row by itself, wherever in the batch the row stands and whoever is beside it.

    Args:
      value: What `Engine(sampler=...)` takes.
      requests: Values of its parameters for rows that are tried together; by default, some that
        its own checks allow.
      vocab_size: Width of the logits it is tried on.
      tokenizer: For parameters given as strings.

    Raises:
      SamplerError: Naming what broke its promise, and how.
    """
    sampler, name = as_sampler(value), f"`{_title(value)}`"
    trial = _trial(sampler, _values(sampler.params, requests, tokenizer), vocab_size)
    step = _step_of(sampler)
    order, others = np.roll(np.arange(NUM_ROWS), 2), np.arange(1, NUM_ROWS)
    with _explained(name):
        state = init_state(sampler, trial.ctx)
        with jax.checking_leaks():
            traced = jax.make_jaxpr(step)(trial.logits[0], state, trial.ctx)
        again = jax.make_jaxpr(_step_of(sampler))(trial.logits[0], state, trial.ctx)
        step = jax.jit(step)
        usual = _trajectory(sampler, step, trial)
        permuted = _trajectory(sampler, step, _reordered(trial, order))
        spoiled = _trajectory(sampler, step, _spoiled(trial, row=0))
    if not _are_same_program(traced, again):
        raise SamplerError(f"{name} is not pure: traced twice, it became two programs.")
    _expect_same(_taken(usual, order), permuted, f"{name} mixes rows: their order changed them")
    _expect_same(
        _taken(usual, others), _taken(spoiled, others), f"{name} let an inactive row change others"
    )


def _title(value: Any) -> str:
    """What the user would call it."""
    if isinstance(value, Sampler):
        value = value.transform
    if isinstance(value, LogitsTransform):
        return ", ".join(name_of(stage.apply) for stage in value.stages) or name_of(value.apply)
    return name_of(value.select if isinstance(value, Draw) else value)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what a trace raises into a `SamplerError` that says whose fault it is."""
    try:
        yield
    except SamplerError:
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("raised by")]
        message = f"{type(error).__name__}, {'; '.join(notes) or f'raised by {name}'}: {cause}"
        if isinstance(error, _ON_THE_HOST):
            message += " It looks at values on the host: use jnp.where and jax.lax instead."
        if "leak" in cause.lower():
            message = f"{name} leaks a tracer: what must outlive a step is state. ({cause})"
        raise SamplerError(message) from error


_ON_THE_HOST = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def _values(
    params: Mapping[str, Param], requests: Sequence[Mapping[str, Any]] | None, tokenizer: Any
) -> dict[str, Array]:
    """Per-request values of all rows; the requests in turn, or the defaults and one other."""
    if requests is None:
        requests = [{}, {name: _example(name, param) for name, param in params.items()}]
    values = {}
    for name, param in params.items():
        rows = []
        for i in range(NUM_ROWS):
            value = requests[i % len(requests)].get(name)
            rows.append(_padded(name, param, value, tokenizer))
        values[name] = jnp.asarray(np.stack(rows))
    return values


_EXAMPLES = (0.5, 2.0, 0.05, 3, 2, 1, 5, [1, 2], [[1], [2, 3]])


def _example(name: str, param: Param) -> Any:
    """A value its check allows that is not the default; None where none is found."""
    is_scalar = param.shape == () and param.encode is None
    for value in _EXAMPLES:
        is_of_dtype = not is_scalar or isinstance(value, float) == (param.dtype == "float32")
        with contextlib.suppress(Exception):
            if is_of_dtype and value != param.default and param.check(value) is None:
                _padded(name, param, value, None)
                return value
    return None


def _padded(name: str, param: Param, value: Any, tokenizer: Any) -> np.ndarray:
    """A value as the engine hands it on."""
    if value is not None and (clause := param.check(value)):
        raise SamplerError(f"`{name}` {clause}, got {value!r}.")
    is_encoded = value is not None and param.encode is not None
    value = param.encode(value, tokenizer) if is_encoded else value  # type: ignore[misc]
    array = np.full(param.shape, param.pad, param.dtype)
    part = param.default if value is None else value
    if part is not None:
        part = np.asarray(part)
        array[tuple(map(slice, part.shape))] = part
    return array


def _trial(sampler: Sampler, values: Mapping[str, Array], vocab_size: int) -> Trial:
    """Rows with texts, noise and logits of their own."""
    rng = np.random.default_rng(0)
    rows = jnp.arange(NUM_ROWS, dtype=jnp.int32)
    needs, zeros = sampler.needs, jnp.zeros(NUM_ROWS, jnp.int32)
    # Few different tokens, so that texts repeat themselves; the first row has a short one.
    texts = rng.integers(0, 6, (NUM_ROWS, max(needs.history, 1)), dtype=np.int32)
    texts[0, : len(texts[0]) // 2] = -1
    hidden = rng.standard_normal((NUM_ROWS, HIDDEN_SIZE)).astype(np.float32)
    ctx = SamplingContext(
        values=values,
        key=row_keys(zeros, rows, zeros + 9),
        position=zeros + 9,
        num_generated=zeros,
        min_new_tokens=zeros + 1,
        last_token=jnp.asarray(texts[:, -1]),
        prompt_len=zeros + 9,
        active=zeros == 0,
        stop_token_ids=jnp.stack([rows, zeros - 1], axis=1),
        slots=rows + 2,
        slot_counts=jnp.asarray(rng.integers(0, 2, (NUM_ROWS + 2, vocab_size)), jnp.int16),
        history=jnp.asarray(texts) if needs.history else None,
        hidden=jnp.asarray(hidden) if needs.hidden else None,
        arrays=sampler.arrays,
    )
    logits = 2 * rng.standard_normal((NUM_STEPS, NUM_ROWS, vocab_size))
    return Trial(ctx, jnp.asarray(logits, jnp.float32))


type Step = Callable[[Array, SamplerState, SamplingContext], tuple[Sample, SamplerState]]


def _step_of(sampler: Sampler) -> Step:
    """One step; a new function every time, so that each is traced anew."""

    def step(
        logits: Array, state: SamplerState, ctx: SamplingContext
    ) -> tuple[Sample, SamplerState]:
        nobody = jnp.zeros(NUM_ROWS, bool)
        wants = Wants(nobody, None, jnp.zeros((NUM_ROWS, 1), jnp.int32), 1)
        return sample(sampler, logits, state, ctx, wants)

    return step


def _trajectory(sampler: Sampler, step: Step, trial: Trial) -> list[tuple[Sample, SamplerState]]:
    """What is drawn and kept, step after step; arrays with a leading axis of rows."""
    ctx, outcome = trial.ctx, []
    state = init_state(sampler, ctx)
    for logits in trial.logits:
        drawn, state = step(logits, state, ctx)
        outcome.append((drawn, state))
        ctx = dataclasses.replace(
            ctx,
            key=jax.vmap(jax.random.fold_in)(ctx.key, ctx.position),
            position=ctx.position + 1,
            num_generated=ctx.num_generated + 1,
            last_token=jnp.maximum(drawn.token, 0),
            history=state.history,
        )
    return outcome


def _are_same_program(a: Any, b: Any) -> bool:
    same_constants = [
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(a.consts, b.consts, strict=False)
    ]
    return str(a) == str(b) and all(same_constants)


def _taken(rows: Any, order: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[order], rows)


def _reordered(trial: Trial, order: np.ndarray) -> Trial:
    """The same rows at other places; what they share stays."""
    ctx = trial.ctx
    nothing = jnp.zeros((NUM_ROWS, 0), jnp.int16)
    alone = _taken(dataclasses.replace(ctx, slot_counts=nothing, arrays=()), order)
    moved = dataclasses.replace(alone, slot_counts=ctx.slot_counts, arrays=ctx.arrays)
    return Trial(moved, trial.logits[:, order])


def _spoiled(trial: Trial, row: int) -> Trial:
    """One row inactive, and its logits NaN."""
    active = trial.ctx.active.at[row].set(False)
    logits = trial.logits.at[:, row].set(jnp.nan)
    return Trial(dataclasses.replace(trial.ctx, active=active), logits)


def _expect_same(usual: Any, other: Any, message: str) -> None:
    """Tokens equal, numbers but for rounding."""
    paths = jax.tree_util.tree_leaves_with_path(usual)
    for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            place = jax.tree_util.keystr(path[1:])
            raise SamplerError(f"{message} (step {path[0].idx}, {place}: {a} and {b}).")
