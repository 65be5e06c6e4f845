"""Samplers with a memory, token after token, against what their definitions say in plain Python."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine.sampling as s
from jaxengine.sampling.builtin.repetition import repeats
from tests.sampling import oracle
from tests.sampling.harness import context, loop, step
from tests.sampling.oracle import softmax

V = 24


def flat_model(texts: Any, i: int) -> np.ndarray:
    """Other logits every step, the same for all rows."""
    return np.tile(2 * np.random.default_rng(i).normal(size=V), (len(texts), 1))


def test_mirostat_follows_its_recurrence():
    taus, etas, num_steps = [1.0, 2.5, 0.0, 4.0], [0.1, 0.3, 0.1, 1.0], 12
    requests = [
        {"mirostat_tau": tau, "mirostat_eta": eta} for tau, eta in zip(taus, etas, strict=True)
    ]
    left = {"left": lambda logits, drawn, ctx: drawn.logits}
    got = loop(s.Sampler(s.mirostat_v2(), capture=left), flat_model, requests, V, num_steps)
    for row, (tau, eta) in enumerate(zip(taus, etas, strict=True)):
        mu = 2 * tau
        for i in range(num_steps):
            logits = flat_model([0], i)[0]
            bits = -np.log2(softmax(logits))
            kept = (bits <= mu) | (logits == logits.max()) if tau else np.full(V, True)
            assert np.array_equal(np.isfinite(got.leaves["capture/left"][row, i]), kept)
            mu -= eta * (bits[got.tokens[row, i]] - tau)
            if tau:
                assert np.isclose(got.states[i].stages[0][row], mu, rtol=1e-5)


def test_mirostat_brings_the_surprise_to_its_target():
    taus, num_steps = [2.0, 2.5, 3.0], 300  # the likeliest tokens alone have 1.4 bits
    sampler = s.Sampler(
        s.chain(s.temperature(), s.mirostat_v2()),
        capture={"bits": lambda logits, drawn, ctx: -drawn.raw_logprob / np.log(2)},
    )
    requests = [{"mirostat_tau": tau, "temperature": 1.3} for tau in taus]
    got = loop(sampler, flat_model, requests, V, num_steps)
    # The sum of errors is (first mu - last mu) / eta, and mu stays small: the mean error vanishes.
    np.testing.assert_allclose(got.leaves["capture/bits"].mean(axis=1), taus, atol=0.1)


def test_state_is_set_up_anew_from_the_same_place():
    """What preemption does: state and history kept, or the prompt and the state so far."""
    requests = [{"mirostat_tau": 2.0, "dry_multiplier": 1.0}] * 2
    sampler = s.Sampler(s.chain(s.dry(max_window=8), s.mirostat_v2()))
    texts = [[1, 2, 3, 1, 2], [4, 4, 4]]
    whole = loop(sampler, flat_model, requests, V, 6, texts=texts)
    state = whole.states[2]
    so_far = [text + tokens[:3].tolist() for text, tokens in zip(texts, whole.tokens, strict=True)]
    for i in range(3, 6):
        ctx = context(sampler, requests, V, texts=so_far, num_generated=i)
        np.testing.assert_array_equal(ctx.history, state.history)
        drawn, state = step(sampler, flat_model(so_far, i), ctx, state)
        np.testing.assert_array_equal(drawn.token, whole.tokens[:, i])
        so_far = [
            [*text, int(token)] for text, token in zip(so_far, np.asarray(drawn.token), strict=True)
        ]


def test_repeats_counts_as_in_its_example():
    text = "abccbcyabc"
    row = np.array([[-1, -1, *(ord(c) for c in text)]], np.int32)
    assert repeats(jnp.asarray(row), 64)[0, 2:].tolist() == [0, 0, 0, 3, 1, 0, 2, 0, 0, 0]
    assert repeats(jnp.asarray(row), 2)[0, 2:].tolist() == [0, 0, 0, 2, 1, 0, 2, 0, 0, 0]
    same = np.full((1, 6), 7, np.int32)
    assert repeats(jnp.asarray(same), 64)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert repeats(jnp.asarray(0 * same - 1), 64)[0].tolist() == [0] * 6


def test_repeats_agrees_with_plain_loops():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (64, 20), dtype=np.int32)
    got = np.asarray(repeats(jnp.asarray(rows), 64))
    for row, lengths in zip(rows, got, strict=True):
        for place, length in enumerate(lengths):
            n = 0
            while n < place and row[place - 1 - n] == row[-1 - n]:
                n += 1
            assert length == n


def test_no_ngram_comes_twice():
    """Three tokens to choose from: without the ban, every pair comes back within ten tokens."""
    logits = np.where(np.arange(V) < 3, 0.0, -30.0)
    request = [{"no_repeat_ngram_size": 2}] * 4
    got = loop(s.no_repeat_ngram(max_window=32), lambda *_: np.tile(logits, (4, 1)), request, V, 8)
    for tokens in got.tokens:
        pairs = list(zip([0, *tokens], tokens, strict=False))
        assert len(set(pairs)) == len(pairs)


def test_forced_tokens_are_replayed_with_the_logprobs_they_were_drawn_with():
    chain = s.chain(s.temperature(), s.top_k_top_p_min_p(), s.forced_tokens(max_tokens=16))
    probabilities = {"p": lambda logits, drawn, ctx: drawn.raw_logprob}
    sampler = s.Sampler(chain, capture=probabilities)
    free = loop(sampler, flat_model, [{"top_p": 0.7, "temperature": 0.8}] * 2, V, 6)
    replay = [
        {"forced_token_ids": tokens.tolist(), "temperature": 0.8, "top_p": 0.7}
        for tokens in free.tokens[:, :4]
    ]
    again = loop(sampler, flat_model, replay, V, 6, seeds=[100, 101])
    np.testing.assert_array_equal(again.tokens[:, :4], free.tokens[:, :4])
    np.testing.assert_allclose(
        again.leaves["capture/p"][:, :4], free.leaves["capture/p"][:, :4], rtol=1e-6
    )
    assert (again.tokens[:, 4:] != free.tokens[:, 4:]).any()


START, END, NEWLINE = 20, 21, 22
THOUGHTS = {
    # prompt, budget, tokens wanted (7 stands for the model's own choice)
    "from the prompt": ([1, START], 2, [7, 7, NEWLINE, END, 7, 7]),
    "deep in the prompt": ([1, START, 3, 3], 3, [7, NEWLINE, END, 7, 7, 7]),
    "closed in the prompt": ([START, 3, END, 3], 0, [7] * 6),
    "not at all": ([1, 2], 0, [7] * 6),
    "no budget": ([1, START], 0, [NEWLINE, END, 7, 7, 7, 7]),
    "newline there": ([1, START, NEWLINE], 0, [END, 7, 7, 7, 7, 7]),
    "off": ([1, START], -1, [7] * 6),
    "long enough": ([1, START], 50, [7] * 6),
}


def test_thoughts_end_at_their_budget():
    logits = np.where(np.arange(V) == 7, 60.0, 0.0)
    prompts, budgets, wanted = zip(*THOUGHTS.values(), strict=True)
    got = loop(
        s.thinking_budget(START, END, NEWLINE, prompt_window=8),
        lambda texts, i: np.tile(logits, (len(texts), 1)),
        [{"thinking_budget": budget} for budget in budgets],
        V,
        6,
        texts=prompts,
    )
    assert dict(zip(THOUGHTS, got.tokens.tolist(), strict=True)) == dict(
        zip(THOUGHTS, wanted, strict=True)
    )


def test_every_thought_has_the_whole_budget():
    """The model thinks again as soon as it may."""

    def model(texts: Any, i: int) -> np.ndarray:
        is_thinking = [START in t and END not in t[len(t) - t[::-1].index(START) :] for t in texts]
        choice = np.where(is_thinking, 7, START)
        return np.where(np.arange(V) == choice[:, None], 60.0, 0.0)

    got = loop(
        s.thinking_budget(START, END, NEWLINE), model, [{"thinking_budget": 1}], V, 8, texts=[[1]]
    )
    assert got.tokens[0].tolist() == [START, 7, NEWLINE, END, START, 7, NEWLINE, END]


def test_watermark_is_found_where_it_is_and_only_there():
    requests = [{"watermark_delta": 2.0}, {"watermark_delta": 0.0}, {"watermark_delta": 4.0}]
    got = loop(s.watermark(gamma=0.5, key=7), flat_model, requests, V, 200)
    marked, plain, strong = (s.detect_watermark(tokens, gamma=0.5, key=7) for tokens in got.tokens)
    assert strong.z_score > marked.z_score > 4 > abs(plain.z_score)
    assert marked.p_value < 1e-4 < plain.p_value
    assert abs(s.detect_watermark(got.tokens[2], gamma=0.5, key=8).z_score) < 4
    pairs = list(zip(got.tokens[2][:-1], got.tokens[2][1:], strict=True))
    greens = [oracle.is_green(int(a), int(b), 0.5, 7) for a, b in pairs]
    every = s.detect_watermark(got.tokens[2], gamma=0.5, key=7, ignore_repeated=False)
    assert (every.num_scored, every.num_green) == (len(pairs), sum(greens))
    assert strong.num_scored == len(set(pairs))


def test_green_lists_have_their_share_and_differ():
    from jaxengine.sampling.builtin.watermark import _is_green

    tokens = np.arange(100_000, dtype=np.uint32)
    lists = np.stack([_is_green(np.full(1, b, np.uint32), tokens, 0.25, 3) for b in range(20)])
    shares = lists.mean(axis=1)
    assert abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / len(tokens))
    both = (lists[:-1] & lists[1:]).mean(axis=1)
    assert abs(both - 0.0625).max() < 5 * np.sqrt(0.0625 / len(tokens))


@pytest.mark.parametrize("ids", [[], [3], np.ones((1, 2), int)])
def test_too_little_text_is_refused(ids: Any):
    with pytest.raises(ValueError, match="two tokens or more"):
        s.detect_watermark(ids)


def test_watermark_arguments_are_checked():
    with pytest.raises(ValueError, match="`gamma` must be in"):
        s.watermark(gamma=1.0)
    with pytest.raises(ValueError, match="`key` must be in"):
        s.detect_watermark([1, 2], key=-1)
