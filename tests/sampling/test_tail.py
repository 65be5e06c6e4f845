"""The end of a chain by kernels, in the interpreter: what is drawn and reported of mixed rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.sampling import chain, default_sampler, temperature, top_k_top_p_min_p, typical
from jaxengine.sampling.logprobs import Wants
from jaxengine.sampling.routes import Route, routes_of
from jaxengine.sampling.sampler import Sample, init_state, sample
from jaxengine.sampling.tail import tail_of
from jaxengine.sampling.transforms import LogitsTransform
from pallas_kernels import dispatch
from tests.sampling.harness import context
from tests.sampling.oracle import softmax

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

V = 700
REQUESTS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.0, "top_k": 3},
    {"top_k": 5},
    {"temperature": 0.6, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.7, "min_p": 0.01},
    {"frequency_penalty": 1.0, "top_p": 0.9},
]
LOGITS = (2 * np.random.default_rng(0).standard_normal((len(REQUESTS), V))).astype(np.float32)


@pytest.fixture(scope="module")
def drawn() -> tuple[Sample, Sample]:
    """By the plain path and by the kernels."""
    sampler, rows = default_sampler(), len(REQUESTS)
    ctx = context(sampler, REQUESTS, V)
    everyone = jnp.ones(rows, bool)
    wants = Wants(everyone, everyone, jnp.asarray(np.tile([4, 0], (rows, 1))), 3)

    def run() -> Sample:
        # Anew each time, for what is traced is kept.
        step = jax.jit(lambda x, ctx: sample(sampler, x, init_state(sampler, ctx), ctx, wants)[0])
        return step(jnp.asarray(LOGITS), ctx)

    plain, call = run(), dispatch.call

    def interpreted(op: str, implementations: Any, implementation: Any, *args: Any, **how: Any):
        is_free = implementation is None and "triton_interpret" in implementations
        chosen = "triton_interpret" if is_free else implementation
        return call(op, implementations, chosen, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "call", interpreted)
        return plain, run()


def test_kernels_draw_the_tokens_of_the_plain_path(drawn: tuple[Sample, Sample]):
    plain, by_kernels = drawn
    assert by_kernels.token.tolist() == plain.token.tolist()
    assert by_kernels.token[1] == LOGITS[1].argmax() and by_kernels.token[4] == LOGITS[4].argmax()


def test_kernels_give_the_logprobs_by_name(drawn: tuple[Sample, Sample]):
    """No token was generated, so no penalty changes a logit."""
    leaves = jax.tree.map(np.asarray, drawn[1].leaves)
    rows, token = np.arange(len(REQUESTS)), np.asarray(drawn[1].token)
    divisor = np.asarray([[request.get("temperature", 1) or 1] for request in REQUESTS])
    own = np.log(softmax(LOGITS / divisor))
    np.testing.assert_allclose(leaves["logprob"], own[rows, token], rtol=1e-4)
    raw = np.log(softmax(LOGITS))[rows, token]
    np.testing.assert_allclose(leaves["raw_logprob"], raw, rtol=1e-4)
    order = np.argsort(-LOGITS, axis=-1, kind="stable")
    np.testing.assert_array_equal(leaves["top_ids"], order[:, :3])
    top = np.take_along_axis(own, order[:, :3], axis=-1)
    np.testing.assert_allclose(leaves["top_logprobs"], top, rtol=1e-4)
    np.testing.assert_allclose(leaves["id_logprobs"], own[:, [4, 0]], rtol=1e-4)
    left = np.full_like(own, -np.inf)
    for row, request in enumerate(REQUESTS):
        probs = np.exp(own[row, order[row]])
        k, p = request.get("top_k", V), request.get("top_p", 1.0)
        is_kept = (np.arange(V) < k) & (np.cumsum(probs) - probs < p)
        is_kept &= probs >= request.get("min_p", 0.0) * probs[0]
        left[row, order[row][is_kept]] = own[row, order[row][is_kept]]
    processed = np.log(softmax(left)[rows, token])
    np.testing.assert_allclose(leaves["processed_logprob"], processed, rtol=1e-4, atol=1e-5)


def test_only_a_temperature_and_then_the_filters_are_a_tail():
    other = LogitsTransform(lambda logits, state, ctx: 2 * logits)
    t, f = temperature(), top_k_top_p_min_p()
    ctx: Any = None

    def tail(unfiltered: Any, rest: Any = ()) -> Any:
        parts = [tuple((stage, (), ctx) for stage in stages) for stages in (unfiltered, rest)]
        return tail_of(Route(*parts))

    assert tail(()) == ((), None, None) and tail(()).pays
    assert tail((other, t), (f,)) == (((other, (), None),), (t, (), None), (f, (), None))
    assert tail((t,)) == ((), (t, (), None), None)
    assert tail((other,), (f,)) == (((other, (), None),), None, (f, (), None))
    assert tail((other, t), (f,)).pays and not tail((other, t)).pays and not tail((other,)).pays
    for not_one in [((t,), (typical(),)), ((), (f, t)), ((t,), (f, typical()))]:
        assert tail(*not_one) is None
    assert chain(t, f).divisor is None and chain(t, f).filters is None


def test_every_route_of_a_sampler_with_a_tail_has_one():
    """Else a row's token would depend on its neighbours."""
    always = LogitsTransform(lambda logits, state, ctx: 2 * logits)
    ctx = context(default_sampler(), [{}], V)
    for stages in [(always, top_k_top_p_min_p()), default_sampler().stages]:
        routes = routes_of(tuple((stage, (), ctx) for stage in stages))
        assert len(routes) > 1 and None not in [tail_of(route) for route in routes]
