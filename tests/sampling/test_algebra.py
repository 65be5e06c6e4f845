"""The algebra: chain, when, per_row, what a draw reports, and what logprobs are listed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine.sampling as s
from jaxengine.sampling import LogitsTransform
from jaxengine.sampling.logprobs import Wants, largest
from jaxengine.sampling.sampler import NAN_TOKEN, NO_TOKEN, default_sampler
from jaxengine.types import Param
from pallas_kernels.vocab_blocks import BLOCK
from tests.sampling.harness import context, loop, step
from tests.sampling.oracle import softmax

B, V = 4, 11
LOGITS = np.random.default_rng(0).normal(size=(B, V)).astype(np.float32)


def surprise_cap(is_per_row: bool) -> LogitsTransform:
    """A stateful, parametrised, random transform, in both forms; it uses all a row can see."""
    rows = (lambda x: x) if is_per_row else (lambda x: x[:, None])

    def apply(logits: Any, state: Any, ctx: Any) -> Any:
        keys = (
            jax.random.fold_in(ctx.key, 1)
            if is_per_row
            else jax.vmap(lambda key: jax.random.fold_in(key, 1))(ctx.key)
        )
        jitter = jax.random.uniform(keys) if is_per_row else jax.vmap(jax.random.uniform)(keys)
        cap = rows(state["cap"] + ctx.bonus + jitter + 0.1 * ctx.history[..., -1])
        counted = logits - 0.5 * ctx.token_counts
        return jnp.minimum(counted, cap) + 0.01 * ctx.arrays["bias"]

    return LogitsTransform(
        apply,
        init=lambda ctx: {"cap": 0.5 * ctx.position, "n": ctx.history.sum(axis=-1)},
        update=lambda state, drawn, ctx: {
            "cap": state["cap"] + drawn.logprob,
            "n": state["n"] + drawn.token + (drawn.logits > 0).sum(axis=-1),
        },
        params={"bonus": Param("float32", 0.0)},
        needs=s.Needs(history=3),
        arrays={"bias": np.arange(V, dtype=np.float32)},
        is_on=lambda ctx: ctx.bonus < 5,
    )


def model(texts: Any, i: int) -> np.ndarray:
    last = np.array([text[-1] for text in texts])
    return np.random.default_rng(i).normal(size=(V, V))[last]


REQUESTS = [{"bonus": 0.1}, {"bonus": 1.0}, {}, {"bonus": -1.0}]
TEXTS = [[1, 2], [3], [4, 5, 6, 7], [8, 9, 10]]


def test_per_row_equals_the_batched_form():
    def run(transform: LogitsTransform) -> Any:
        return loop(transform, model, REQUESTS, V, 4, texts=TEXTS)

    batched, by_row = run(surprise_cap(False)), run(s.per_row(surprise_cap(True)))
    np.testing.assert_array_equal(batched.tokens, by_row.tokens)
    for a, b in zip(jax.tree.leaves(batched.states), jax.tree.leaves(by_row.states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    together = loop(surprise_cap(False), model, REQUESTS, V, 4, texts=TEXTS)
    for i in range(B):
        alone = loop(surprise_cap(False), model, [REQUESTS[i]], V, 4, texts=[TEXTS[i]], seeds=[i])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_when_keeps_the_state_of_rows_that_are_off():
    count = LogitsTransform(
        lambda logits, state, ctx: -logits,
        init=lambda ctx: 0 * ctx.position,
        update=lambda state, drawn, ctx: state + 1,
        params={"is_counted": Param("int32", 0)},
    )
    transform = s.when(lambda ctx: ctx.is_counted > 0, count)
    left = {"left": lambda logits, drawn, ctx: drawn.logits}
    requests = [{"is_counted": i % 2} for i in range(B)]
    got = loop(s.Sampler(transform, capture=left), lambda *_: LOGITS, requests, V, 3)
    np.testing.assert_array_equal(got.states[-1].stages[0], [0, 3, 0, 3])
    signs = np.array([1, -1, 1, -1])[:, None]
    np.testing.assert_array_equal(got.leaves["capture/left"][:, 0], signs * LOGITS)


def test_a_step_with_nothing_on_runs_no_conditional_transform():
    calls = []

    def apply(logits: Any, state: Any, ctx: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return logits

    transform = s.when(
        lambda ctx: ctx.is_on > 0, LogitsTransform(apply, params={"is_on": Param("int32", 0)})
    )
    for value in (0, 1):
        sampler = s.Sampler(transform)
        step(sampler, LOGITS, context(sampler, [{"is_on": value}] * B, V))
        jax.effects_barrier()
        assert len(calls) == value


def test_drawn_tells_the_token_and_its_probabilities():
    kept = LogitsTransform(
        lambda logits, state, ctx: jnp.where(jnp.arange(V) < 5, 2 * logits, -jnp.inf),
        init=lambda ctx: jnp.zeros((*ctx.position.shape, 3)),
        update=lambda state, drawn, ctx: jnp.stack(
            [drawn.token.astype(jnp.float32), drawn.logprob, drawn.raw_logprob], axis=1
        ),
    )
    sampler = s.Sampler(kept)
    drawn, state = step(sampler, LOGITS, context(sampler, [{}] * B, V))
    token, rows = np.asarray(drawn.token), np.arange(B)
    processed = softmax(np.where(np.arange(V) < 5, 2 * LOGITS, -np.inf))[rows, token]
    want = np.stack([token, np.log(processed), np.log(softmax(LOGITS)[rows, token])], axis=1)
    np.testing.assert_allclose(state.stages[0], want, rtol=1e-5)


def test_captures_and_aux_come_back_with_every_token():
    def select(logits: Any, state: Any, ctx: Any) -> Any:
        return logits.argmax(axis=-1), {"margin": jax.lax.top_k(logits, 2)[0]}

    capture = {
        "model": lambda logits, drawn, ctx: logits[:, :2],
        "last": lambda logits, drawn, ctx: ctx.last_token,
    }
    halved = LogitsTransform(lambda logits, state, ctx: logits / 2)
    sampler = s.Sampler(halved, s.Draw(select), capture=capture)
    drawn, _ = step(sampler, LOGITS, context(sampler, [{}] * B, V, texts=TEXTS))
    np.testing.assert_array_equal(drawn.leaves["capture/model"], LOGITS[:, :2])
    np.testing.assert_array_equal(drawn.leaves["capture/last"], [2, 3, 7, 10])
    want = np.sort(LOGITS / 2, axis=1)[:, :-3:-1]
    np.testing.assert_array_equal(drawn.leaves["aux"]["margin"], want)


def test_what_cannot_be_drawn_is_told_apart():
    logits = LOGITS.copy()
    logits[1, 3] = np.nan
    nothing = LogitsTransform(
        lambda logits, state, ctx: jnp.where(ctx.is_shut[:, None] > 0, -jnp.inf, logits),
        params={"is_shut": Param("int32", 0)},
    )
    sampler = s.Sampler(nothing)
    requests = [{}, {}, {"is_shut": 1}, {}]
    drawn, _ = step(sampler, logits, context(sampler, requests, V))
    token = np.asarray(drawn.token)
    assert token[1] == NAN_TOKEN and token[2] == NO_TOKEN and (token[[0, 3]] >= 0).all()
    outside = s.Draw(lambda logits, state, ctx: 0 * ctx.position + V)
    drawn, _ = step(outside, LOGITS, context(s.as_sampler(outside), [{}] * B, V))
    np.testing.assert_array_equal(drawn.token, NO_TOKEN)


@pytest.mark.parametrize(
    "name", ["top_p", "typical_p", "eta_cutoff", "mirostat_tau", "top_n_sigma"]
)
def test_no_filter_hides_nan(name: str):
    logits = LOGITS.copy()
    logits[1, 3] = np.nan
    chain = s.chain(
        s.top_k_top_p_min_p(), s.typical(), s.eta(), s.mirostat_v2(), s.top_n_sigma(), s.xtc()
    )
    sampler = s.Sampler(chain)
    drawn, _ = step(sampler, logits, context(sampler, [{name: 0.4}] * B, V))
    assert np.asarray(drawn.token)[1] == NAN_TOKEN
    assert (np.asarray(drawn.token)[[0, 2, 3]] >= 0).all()


def test_temperature_0_takes_the_lowest_of_equals_beside_random_rows():
    logits = np.tile(np.asarray([0, 3, 3, 1], np.float32), (3, 1))
    sampler = default_sampler()
    requests = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "top_p": 0.5}]
    for chosen in (requests, requests[:1] * 3):
        drawn, _ = step(sampler, logits, context(sampler, chosen, 4))
        assert np.asarray(drawn.token)[[0, 2]].tolist() == [1, 1]


def test_what_a_companion_may_not_draw_it_is_given():
    """The companion's own text forbids the token; the leader's word holds."""
    sampler = s.Sampler(s.no_repeat_ngram(max_window=4), combine=lambda logits, ctx: logits[:, 0])
    logits = np.zeros((2, V), np.float32)
    logits[:, 7] = 50
    requests = [{"no_repeat_ngram_size": 1}] * 2
    ctx = context(sampler, requests, V, texts=[[1, 2], [7, 7]])
    group = jnp.array([[0, 1], [0, 1]], jnp.int32)
    drawn, state = step(sampler, logits, ctx, group=group)
    assert np.asarray(drawn.token).tolist() == [7, 7]
    assert np.asarray(state.history)[:, -1].tolist() == [7, 7]


def test_parameters_of_two_parts_must_agree():
    other = LogitsTransform(lambda x, state, ctx: x, params={"temperature": Param("int32", 1)})
    with pytest.raises(ValueError, match="`temperature` differently"):
        s.chain(s.temperature(), other)
    sampler = s.Sampler(s.temperature(), combine=s.classifier_free_guidance())
    assert set(sampler.params) == {"temperature", "guidance_scale"}


def full_sort(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-x, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(x, order, axis=-1), order


@pytest.mark.parametrize("width", [3, 50, 2 * BLOCK * 5, 2 * BLOCK * 5 + 1, 4000])
@pytest.mark.parametrize("levels", [3, 1000])
def test_listed_logprobs_are_those_of_a_full_sort(width: int, levels: int):
    """With many ties at three levels, some of them infinite."""
    x = np.random.default_rng(width).integers(0, levels, (3, width)).astype(np.float32)
    x[1, ::2] = -np.inf
    count = min(5, width)
    values, places = jax.jit(largest, static_argnums=1)(x, 5)
    want, order = full_sort(x, count)
    np.testing.assert_array_equal(values[:, :count], want)
    np.testing.assert_array_equal(places[:, :count], order)


FILTERED, TEMPERED, PLAIN = {"temperature": 0.5, "top_k": 2}, {"temperature": 0.5}, {}
GREEDY = {"temperature": 0.0}
FILTERS_FIRST = s.Sampler(s.chain(s.top_k_top_p_min_p(), s.temperature()))


@pytest.mark.parametrize("sampler", [default_sampler(), FILTERS_FIRST], ids=["usual", "reversed"])
@pytest.mark.parametrize(
    "requests",
    [
        [FILTERED] * B,
        [TEMPERED, TEMPERED, GREEDY, PLAIN],
        [PLAIN] * B,
        [GREEDY] * B,
        [FILTERED, TEMPERED, PLAIN, GREEDY],
    ],
    ids=["filtered", "tempered", "plain", "greedy", "mixed"],
)
def test_logprobs_are_named_after_what_they_are_of(sampler: s.Sampler, requests: list[Any]):
    """Whatever the step leaves out because no row has it on."""
    ids = np.tile(np.asarray([4, 0, -1], np.int32), (B, 1))
    everyone = jnp.ones(B, bool)
    wants = Wants(everyone, everyone, jnp.asarray(ids), 3)
    drawn, _ = step(sampler, LOGITS, context(sampler, requests, V), wants=wants)
    rows, token = np.arange(B), np.asarray(drawn.token)
    scale = np.asarray([[1 / (request.get("temperature", 1) or 1)] for request in requests])
    second = np.sort(LOGITS)[:, -2:-1]
    lowest = np.where([["top_k" in request] for request in requests], second, -np.inf)
    kept = np.where(LOGITS >= lowest, scale * LOGITS, -np.inf)
    raw, processed = np.log(softmax(LOGITS)), softmax(kept)
    # SGLang's measure is of what stands before the first filter.
    own = raw if sampler is FILTERS_FIRST else np.log(softmax(scale * LOGITS))
    leaves = {name: np.asarray(leaf) for name, leaf in drawn.leaves.items()}
    np.testing.assert_allclose(leaves["logprob"], own[rows, token], rtol=1e-5)
    np.testing.assert_allclose(leaves["raw_logprob"], raw[rows, token], rtol=1e-5)
    np.testing.assert_allclose(
        leaves["processed_logprob"], np.log(processed[rows, token]), rtol=1e-4, atol=1e-6
    )
    values, order = full_sort(own, 3)
    np.testing.assert_allclose(leaves["top_logprobs"], values, rtol=1e-5)
    np.testing.assert_array_equal(leaves["top_ids"], order)
    np.testing.assert_allclose(leaves["id_logprobs"][:, :2], own[:, [4, 0]], rtol=1e-5)
