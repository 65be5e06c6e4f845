"""Samplers that a call brings along: any function, with state, in both forms, beside any other."""

import asyncio
import gc
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.errors import RequestError, SamplerError
from jaxengine.runtime import runner, samplers
from jaxengine.sampling import (
    Draw,
    LogitsTransform,
    Needs,
    Param,
    Sampler,
    chain,
    detect_watermark,
    dry,
    forced_tokens,
    gumbel_max,
    mirostat_v2,
    temperature,
    watermark,
)
from tests.engine import tiny
from tests.engine.conftest import wait_for
from tests.engine.test_windows import compilations

GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
PROMPT, OTHER, LONG = tiny.prompts_of(6, 9, 90)
SURPRISED = {"mirostat_tau": 3.0, "seed": 7, "max_new_tokens": 60, "ignore_eos": True}


FUSE_AFTER_STEPS = runner.FUSE_AFTER_STEPS


@pytest.fixture(autouse=True)
def stays_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers stay in split form but where a test says otherwise: fusing them takes time."""
    monkeypatch.setattr(runner, "FUSE_AFTER_STEPS", 1 << 30)


def mirostat() -> Sampler:
    """Built anew for every call, as a notebook cell does."""
    return Sampler(chain(temperature(), mirostat_v2()))


def compiled(engine: Any) -> int:
    return engine.stats()["programs"]["num_compiled"]


def ids(output: Any) -> list[int]:
    return output["output_ids"]


def test_any_function_is_a_sampler_and_equal_ones_compile_once(engine: Any):
    engine.generate(input_ids=PROMPT, sampler=lambda logits, ctx: jnp.argmax(logits, -1))
    before = {key.owner for key in engine._programs._done}
    num_alive = len(engine._samplers.alive())
    for _ in range(10):
        output = engine.generate(
            input_ids=PROMPT,
            sampling_params=GREEDY,
            sampler=lambda logits, ctx: jnp.argmax(logits, -1),
        )
        tiny.assert_greedy(PROMPT, ids(output))
    assert {key.owner for key in engine._programs._done} == before
    assert len(engine._samplers.alive()) == num_alive


def test_what_a_function_closes_over_makes_it_another(engine: Any):
    def pick(rank: int) -> Callable[..., jax.Array]:
        return lambda logits, ctx: jnp.argsort(logits, -1, descending=True)[:, rank]

    outputs = [
        engine.generate(input_ids=PROMPT, sampling_params=GREEDY, sampler=pick(rank))
        for rank in (0, 1)
    ]
    for rank, output in enumerate(outputs):
        text = list(PROMPT)
        for token in ids(output)[:5]:
            logits = tiny.forward(tiny.TENSORS, tiny.CONFIG, text)[-1]
            assert token == np.argsort(-logits)[rank]
            text.append(token)


def test_split_and_fused_forms_draw_the_same(engine: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "FUSE_AFTER_STEPS", FUSE_AFTER_STEPS)

    def run() -> Any:
        return engine.generate(
            input_ids=[PROMPT, OTHER], sampling_params=SURPRISED, sampler=mirostat()
        )

    first = [ids(output) for output in run()]
    live = engine._samplers.get(mirostat())
    assert live.num_split_steps > 0 and live.is_stateful
    for _ in range(10):
        before = live.num_split_steps
        assert [ids(output) for output in run()] == first
        if live.num_split_steps == before:  # both prefill and windows are fused by now
            break
        engine.wait_until_compiled(background=True)
    else:
        pytest.fail("the sampler was never compiled into the window")
    now = compiled(engine)
    assert [ids(output) for output in run()] == first
    assert compiled(engine) == now


def test_values_never_recompile_and_are_checked(engine: Any):
    engine.generate(input_ids=PROMPT, sampling_params=SURPRISED, sampler=mirostat())
    with compilations() as events:
        for tau in (1.0, 2.5, 5):
            params = {**SURPRISED, "mirostat_tau": tau}
            engine.generate(input_ids=PROMPT, sampling_params=params, sampler=mirostat())
    assert events == []
    for params, error, words in (
        ({"mirostat_tau": -1}, RequestError, "`mirostat_tau` must be"),
        ({"mirostat_tua": 1}, TypeError, "did you mean `mirostat_tau`"),
        ({"top_p": 0.5}, TypeError, "`top_p` is not a parameter"),
    ):
        with pytest.raises(error, match=words):
            engine.generate(input_ids=PROMPT, sampling_params=params, sampler=mirostat())


def identity(logits: Any, state: Any, ctx: Any) -> Any:
    return logits


def raises(logits: Any, ctx: Any) -> Any:
    raise ZeroDivisionError("no luck")


leaked: list[Any] = []


def leaks(logits: Any, state: Any, ctx: Any) -> Any:
    leaked.append(logits * 2)
    return logits


BAD_SAMPLERS: list[tuple[Any, type[Exception], str]] = [
    (raises, SamplerError, "ZeroDivisionError: no luck, raised by `raises`"),
    (lambda logits, ctx: logits, SamplerError, "must return a token for each row"),
    (lambda logits, ctx: jnp.zeros(7, jnp.int32), SamplerError, "must return a token for each row"),
    (lambda logits, ctx: ctx.mood, SamplerError, "no `mood`"),
    (lambda logits: logits, SamplerError, "TypeError"),
    (LogitsTransform(lambda x, s, c: x[:, :3]), SamplerError, "must return the logits as float32"),
    (LogitsTransform(lambda x, s, c: x.astype(jnp.bfloat16)), SamplerError, "bfloat16"),
    (LogitsTransform(identity, init=lambda ctx: jnp.zeros(())), SamplerError, "leading axis of"),
    (
        LogitsTransform(
            identity,
            init=lambda ctx: ctx.position,
            update=lambda state, drawn, ctx: state.astype(jnp.float32),
        ),
        SamplerError,
        "must return its state as int32",
    ),
    (LogitsTransform(leaks), SamplerError, "[Ll]eak"),
    (LogitsTransform(identity, params={"position": Param("int32", 0)}), SamplerError, "reserved"),
    (Sampler(chain(), combine=lambda x, c: x[:, 0]), SamplerError, "companions"),
    (5, TypeError, "`sampler` must be"),
]


@pytest.mark.parametrize("sampler, error, words", BAD_SAMPLERS, ids=range(len(BAD_SAMPLERS)))
def test_bad_sampler_is_refused_by_name_and_the_engine_lives(
    engine: Any, sampler: Any, error: type[Exception], words: str
):
    params = {"max_new_tokens": 4}
    with pytest.raises(error, match=words):
        engine.generate(input_ids=PROMPT, sampling_params=params, sampler=sampler)
    leaked.clear()
    output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    tiny.assert_greedy(PROMPT, ids(output))


def test_sampler_that_removes_every_token_fails_its_own_request(engine: Any):
    nothing = LogitsTransform(lambda logits, state, ctx: jnp.full_like(logits, -jnp.inf))

    async def both() -> list[Any]:
        return await asyncio.gather(
            engine.async_generate(input_ids=PROMPT, sampler=nothing),
            engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY),
            return_exceptions=True,
        )

    failed, output = asyncio.run(both())
    assert isinstance(failed, SamplerError) and "left no token" in str(failed)
    tiny.assert_greedy(PROMPT, ids(output))


def test_samplers_side_by_side_draw_what_they_draw_alone(engine: Any):
    """One forward step, several samplers; nobody sees a neighbour's state or parameters."""
    calls: list[dict[str, Any]] = [
        {"sampling_params": {**SURPRISED, "mirostat_tau": 2.0}, "sampler": mirostat()},
        {"sampling_params": {**SURPRISED, "mirostat_tau": 4.0}, "sampler": mirostat()},
        {"sampling_params": {"seed": 3, "top_k": 20, "max_new_tokens": 50, "ignore_eos": True}},
        {
            "sampling_params": {"max_new_tokens": 40, "ignore_eos": True},
            "sampler": lambda logits, ctx: jnp.argmin(logits, -1),
        },
    ]
    alone = [ids(engine.generate(input_ids=PROMPT, **call)) for call in calls]

    async def together(order: list[int]) -> list[Any]:
        return await asyncio.gather(
            *(engine.async_generate(input_ids=PROMPT, **calls[i]) for i in order)
        )

    for order in ([0, 1, 2, 3], [3, 1, 0, 2, 1]):
        outputs = asyncio.run(together(order))
        assert [ids(output) for output in outputs] == [alone[i] for i in order]


def test_state_and_history_survive_preemption(make_engine: Any):
    """The pool holds one and a half of them, so they are preempted and computed anew, in chunks:
    one prompt and all that is computed anew are longer than a prefill."""
    engine = make_engine(disable_radix_cache=True)
    texts = [PROMPT, LONG]
    both = Sampler(chain(dry(), temperature(), mirostat_v2()))
    params = {**SURPRISED, "max_new_tokens": 100, "dry_multiplier": 1.0, "dry_allowed_length": 1}
    alone = [ids(engine.generate(input_ids=p, sampling_params=params, sampler=both)) for p in texts]

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(
                engine.async_generate(input_ids=p, sampling_params=params, sampler=both)
                for p in texts * 2
            )
        )

    outputs = asyncio.run(together())
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    assert [ids(output) for output in outputs] == alone * 2


def test_history_is_the_end_of_the_text(engine: Any):
    draw = gumbel_max._replace(needs=Needs(history=8))
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 30, "ignore_eos": True},
        sampler=Sampler(chain(temperature()), draw),
        capture={"history": lambda logits, drawn, ctx: ctx.history},
    )
    text = [-1] * 8 + PROMPT + ids(output)
    for i, history in enumerate(output["captures"]["history"]):
        end = 8 + len(PROMPT) + i
        assert history.tolist() == text[end - 8 : end]


def test_hidden_state_gives_the_logits(engine: Any):
    transform = LogitsTransform(identity, needs=Needs(hidden=True))
    draw = Draw(
        lambda logits, state, ctx: (jnp.argmax(logits, -1), {"hidden": ctx.hidden}),
        needs=Needs(hidden=True),
    )
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 12, "ignore_eos": True},
        sampler=Sampler(transform, draw),
    )
    hidden = output["captures"]["aux/hidden"]
    assert hidden.shape == (12, tiny.CONFIG.hidden_size) and hidden.dtype == np.float32
    logits = hidden @ tiny.TENSORS["lm_head.weight"].T
    assert logits.argmax(-1).tolist() == ids(output)


def entropy(logits: Any, drawn: Any, ctx: Any) -> Any:
    log_p = jax.nn.log_softmax(drawn.logits)
    return -(jnp.exp(log_p) * log_p).sum(-1)


@pytest.mark.parametrize("is_streaming", [False, True])
def test_captures_come_with_every_token(engine: Any, is_streaming: bool):
    params = {"temperature": 0.5, "seed": 1, "max_new_tokens": 25, "ignore_eos": True}
    call = {"input_ids": PROMPT, "sampling_params": params}
    plain = ids(engine.generate(**call))
    capture = {
        "entropy": entropy,
        "rank": lambda logits, drawn, ctx: drawn.token > 100,
        "raw": lambda logits, drawn, ctx: jax.lax.top_k(jax.nn.log_softmax(logits), 3),
    }
    output = engine.generate(**call, capture=capture, stream=is_streaming)
    if is_streaming:
        *_, output = output
    assert ids(output) == plain
    captured = output["captures"]
    assert captured["rank"].dtype == bool
    assert captured["rank"].tolist() == [token > 100 for token in plain]
    text = PROMPT + plain
    logits = tiny.forward(tiny.TENSORS, tiny.CONFIG, text)[len(PROMPT) - 1 : -1]
    top = np.argsort(-logits, axis=-1)[:, :3]
    np.testing.assert_array_equal(captured["raw/1"], top)
    raw = np.take_along_axis(tiny.log_softmax(logits), top, axis=-1)
    np.testing.assert_allclose(captured["raw/0"], raw, rtol=1e-3, atol=1e-4)
    log_p = tiny.log_softmax(logits / 0.5)
    np.testing.assert_allclose(
        captured["entropy"], -(np.exp(log_p) * log_p).sum(-1), rtol=1e-3, atol=1e-4
    )


def test_captures_end_where_a_stop_string_does(engine: Any):
    call = {"prompt": "the", "sampling_params": {**GREEDY, "max_new_tokens": 30}}
    whole = engine.generate(**call)
    [middle] = re.findall(r"[a-z0-9]{2}", whole["text"][8:])[:1]
    call["sampling_params"] = {**call["sampling_params"], "stop": middle}
    output = engine.generate(**call, capture={"entropy": entropy})
    assert len(output["captures"]["entropy"]) == len(ids(output)) < 30


def test_learned_arrays_are_replaced_without_a_recompile(engine: Any):
    def biased(bias: jax.Array) -> LogitsTransform:
        return LogitsTransform(lambda logits, state, ctx: logits + ctx.arrays, arrays=bias)

    vocab = tiny.CONFIG.vocab_size
    counts = []
    for token in (5, 9):
        output = engine.generate(
            input_ids=PROMPT,
            sampling_params={"max_new_tokens": 5, "ignore_eos": True},
            sampler=chain(biased(jnp.zeros(vocab).at[token].set(1e6))),
        )
        assert ids(output) == [token] * 5
        counts.append(compiled(engine))
    assert counts[0] == counts[1]


def test_given_tokens_are_replayed_with_their_logprobs_and_keep_their_watermark(engine: Any):
    marked = chain(temperature(), watermark(gamma=0.5), forced_tokens(max_tokens=32))
    params = {"watermark_delta": 6.0, "temperature": 0.9, "max_new_tokens": 30, "ignore_eos": True}
    call = {"input_ids": PROMPT, "sampler": marked, "return_logprob": True, "top_logprobs_num": 3}
    drawn = engine.generate(sampling_params={**params, "seed": 5}, **call)
    forced = {**params, "seed": 6, "forced_token_ids": ids(drawn)}
    again = engine.generate(sampling_params=forced, **call)
    assert ids(again) == ids(drawn)
    for name in ("output_token_logprobs", "output_top_logprobs", "output_token_raw_logprobs"):
        assert again["meta_info"][name] == drawn["meta_info"][name]
    assert again["meta_info"]["output_token_processed_logprobs"] == [0.0] * 30
    plain = engine.generate(sampling_params={**params, "watermark_delta": 0.0, "seed": 5}, **call)
    assert detect_watermark(ids(drawn), gamma=0.5).p_value < 1e-3
    assert detect_watermark(ids(plain), gamma=0.5).p_value > 0.05


def guided(scale: float) -> Callable[..., jax.Array]:
    return lambda logits, ctx: logits[:, 1] + scale * (logits[:, 0] - logits[:, 1])


def guided_greedy(prompt: list[int], companion: list[int], scale: float, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        a, b = (
            tiny.forward(tiny.TENSORS, tiny.CONFIG, text + tokens)[-1]
            for text in (prompt, companion)
        )
        tokens.append(int((b + scale * (a - b)).argmax()))
    return tokens


def test_companions_go_on_in_lockstep(engine: Any):
    prompts = tiny.prompts_of(6, 30, 12, 9, seed=3)
    companions = tiny.prompts_of(9, 1, 20, 17, seed=4)
    sampler = Sampler(chain(temperature()), combine=guided(1.5))
    outputs = engine.generate(
        input_ids=prompts,
        companions=[[c] for c in companions],
        sampling_params=GREEDY,
        sampler=sampler,
    )
    for prompt, companion, output in zip(prompts, companions, outputs, strict=True):
        assert ids(output) == guided_greedy(prompt, companion, 1.5, 20)
        assert output["meta_info"]["prompt_tokens"] == len(prompt)
    # Guidance by oneself is no guidance.
    output = engine.generate(
        input_ids=PROMPT, companions=[PROMPT], sampling_params=GREEDY, sampler=sampler
    )
    tiny.assert_greedy(PROMPT, ids(output))
    with pytest.raises(RequestError, match="companions"):
        engine.generate(input_ids=[PROMPT, OTHER], companions=[[OTHER]], sampler=sampler)


def test_sampler_is_forgotten_when_nobody_uses_it(engine: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samplers, "MAX_RECENT", 1)

    def make(number: int) -> Callable[..., Any]:
        return lambda logits, ctx: jnp.argmax(logits, -1) * 0 + number

    def use(number: int) -> tuple[weakref.ref[Any], int]:
        sampler = make(number)
        output = engine.generate(
            input_ids=PROMPT, sampling_params={"max_new_tokens": 3}, sampler=sampler
        )
        assert ids(output) == [number] * 3
        return weakref.ref(sampler), max(key.owner for key in engine._programs._done)

    gone, owner = use(11)
    use(12)

    def is_forgotten() -> bool:
        gc.collect()
        return gone() is None

    assert wait_for(is_forgotten)
    assert owner not in {key.owner for key in engine._programs._done}
    # Only the engine's own and the last are left.
    assert len(engine._samplers._recent) == 1


def test_engine_with_a_sampler_of_its_own(make_engine: Any):
    def coldest(logits: Any, state: Any, ctx: Any) -> Any:
        return logits / ctx.coldness[:, None]

    transform = LogitsTransform(coldest, params={"coldness": Param("float32", 1e-4)})
    engine = make_engine(sampler=transform)
    output = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 20, "ignore_eos": True}
    )
    tiny.assert_greedy(PROMPT, ids(output))
    # And another for a single call.
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 5, "ignore_eos": True},
        sampler=lambda logits, ctx: 0 * ctx.position + 7,
    )
    assert ids(output) == [7] * 5


def test_mirostat_meets_its_target(engine: Any):
    """Over a long text the mean surprise is tau."""
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={
            "mirostat_tau": 3.0,
            "mirostat_eta": 0.2,
            "max_new_tokens": 220,
            "ignore_eos": True,
            "seed": 1,
        },
        sampler=mirostat(),
        return_logprob=True,
    )
    surprise = -np.asarray(output["meta_info"]["output_token_raw_logprobs"]) / math.log(2)
    assert abs(surprise[20:].mean() - 3.0) < 0.2
