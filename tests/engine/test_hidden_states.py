"""Hidden states of every token, whatever cache, chunks and windows did, against plain numpy."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine
from jaxengine.errors import ConfigError, RequestError
from jaxengine.nn.attention import ForwardContext, dense_attention
from tests.engine import tiny
from tests.oracle import bound_model, params_from_tensors

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
PROMPT, OTHER, LONG = tiny.prompts_of(40, 9, 90, seed=5)


def states_of(ids: list[int]) -> list[np.ndarray]:
    return tiny.hidden_states(tiny.TENSORS, tiny.CONFIG, tiny.embeddings(tiny.TENSORS, ids))


def hidden(output: dict[str, Any]) -> np.ndarray:
    return output["meta_info"]["hidden_states"]


def assert_all_states(prompt: list[int], output: dict[str, Any]) -> None:
    """Of every token, the last one included."""
    got, wanted = hidden(output), states_of([*prompt, *output["output_ids"]])[-1]
    assert got.dtype == np.float32 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)


def more_reads(engine: Any) -> int:
    """Of results by the host, beyond one a step."""
    stats = engine.stats()
    return stats["num_host_reads"] - stats["num_windows"] - stats["num_prefills"]


def test_every_token_has_its_state_cached_or_not(engine: Any):
    """40 tokens end after 32 and 8 steps of windows; the second time the prompt is cached."""
    for _ in range(2):
        output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    assert output["meta_info"]["cached_tokens"] > 0 and "hidden_states" not in output["meta_info"]
    before = more_reads(engine)
    output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY, return_hidden_states=True)
    assert more_reads(engine) == before
    assert output["meta_info"]["cached_tokens"] == 0
    assert_all_states(PROMPT, output)


@pytest.mark.parametrize("num_new", [1, 2, 31, 32, 33, 34])
def test_at_the_ends_of_windows(engine: Any, num_new: int):
    params = {**GREEDY, "max_new_tokens": num_new}
    output = engine.generate(input_ids=OTHER, sampling_params=params, return_hidden_states=True)
    assert len(output["output_ids"]) == num_new
    assert_all_states(OTHER, output)


def test_of_the_prompt_alone(engine: Any):
    params = {"max_new_tokens": 0}
    output = engine.generate(input_ids=LONG, sampling_params=params, return_hidden_states=True)
    assert output["output_ids"] == []
    assert_all_states(LONG, output)


def test_side_by_side_with_those_who_want_none(engine: Any):
    """A list of wishes, prompts longer than a chunk, preemption: the pool holds 240 tokens."""
    prompts = [LONG, OTHER, PROMPT, LONG[:50]]
    wishes = [True, False, "last", "mean"]
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={**GREEDY, "max_new_tokens": 30},
        return_hidden_states=wishes,
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        tiny.assert_greedy(prompt, output["output_ids"])
    assert_all_states(LONG, outputs[0])
    assert "hidden_states" not in outputs[1]["meta_info"]
    last = states_of([*PROMPT, *outputs[2]["output_ids"]])[-1][-1]
    np.testing.assert_allclose(hidden(outputs[2]), last, rtol=2e-3, atol=2e-3)
    mean = states_of([*LONG[:50], *outputs[3]["output_ids"]])[-1].mean(axis=0)
    np.testing.assert_allclose(hidden(outputs[3]), mean, rtol=2e-3, atol=2e-3)


def stops_in(token_ids: list[int], tokenizer: Any) -> dict[int, str]:
    """Tokens whose text comes up first with them, by the length of what they end; 33 tokens end
    with the first window."""
    texts = [(i + 1, tokenizer.decode([token])) for i, token in enumerate(token_ids)]
    return {
        length: text
        for length, text in texts
        if "\ufffd" not in text and text not in tokenizer.decode(token_ids[: length - 1])
    }


def test_preempted_and_computed_anew_they_are_reported_once(engine: Any):
    """Texts of 129 and 153 tokens in a pool of 240."""
    prompts = tiny.prompts_of(9, 33, seed=6)
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={**GREEDY, "max_new_tokens": 120},
        return_hidden_states=True,
    )
    assert sum(o["meta_info"]["num_retractions"] for o in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_all_states(prompt, output)


@pytest.mark.parametrize("which", [True, "last"])
def test_with_a_stop_string(engine: Any, tokenizer: Any, which: Any):
    """The text ends at one place of a window after the other: its last state is there, too."""
    prompts = tiny.prompts_of(*[9] * 8, seed=3)
    wholes = [o["output_ids"] for o in engine.generate(input_ids=prompts, sampling_params=GREEDY)]
    found = [stops_in(whole, tokenizer) for whole in wholes]
    prompt, stops = next((p, s) for p, s in zip(prompts, found, strict=True) if 33 in s)
    for length, stop in stops.items():
        output = engine.generate(
            input_ids=prompt, sampling_params={**GREEDY, "stop": stop}, return_hidden_states=which
        )
        assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert len(output["output_ids"]) == length
        if which is True:
            assert_all_states(prompt, output)
        else:
            last = states_of([*prompt, *output["output_ids"]])[-1][-1]
            np.testing.assert_allclose(hidden(output), last, rtol=2e-3, atol=2e-3)
    assert len(stops) > 5


def test_a_stream_ends_with_them(engine: Any):
    *chunks, last = engine.generate(
        input_ids=PROMPT, sampling_params=GREEDY, return_hidden_states=True, stream=True
    )
    assert_all_states(PROMPT, last)
    assert not [c for c in chunks if "hidden_states" in c["meta_info"]]
    assert [i for c in (*chunks, last) for i in c["delta_ids"]] == last["output_ids"]


def test_stop_tokens_and_samples(engine: Any):
    first = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    params = {"temperature": 0, "n": 2, "stop_token_ids": [first[7]], "max_new_tokens": 40}
    for output in engine.generate(
        input_ids=PROMPT, sampling_params=params, return_hidden_states=True
    ):
        assert output["output_ids"] == first[: first.index(first[7]) + 1]
        assert_all_states(PROMPT, output)


def test_sglangs_lists(engine: Any):
    """8 tokens are 8 entries: the prompt's, and one for every output token but the last."""
    params = {**GREEDY, "max_new_tokens": 8}
    output = engine.generate(
        input_ids=OTHER,
        sampling_params=params,
        return_hidden_states=True,
        hidden_states_format="sglang",
    )
    lists = hidden(output)
    wanted = states_of([*OTHER, *output["output_ids"]])[-1]
    assert len(lists) == output["meta_info"]["completion_tokens"] == 8
    np.testing.assert_allclose(lists[0], wanted[:9], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(lists[1:], wanted[9:-1], rtol=2e-3, atol=2e-3)


def test_with_a_sampler_of_the_calls_own(engine: Any):
    output = engine.generate(
        input_ids=OTHER,
        sampling_params={**GREEDY, "max_new_tokens": 10},
        sampler=lambda logits, ctx: jnp.argmax(logits, -1),
        return_hidden_states=True,
    )
    tiny.assert_greedy(OTHER, output["output_ids"])
    assert_all_states(OTHER, output)


def test_layers_are_counted_as_in_transformers():
    """In the order asked for; 0 is the embeddings, 2 of 2 layers is after the final norm."""
    model = bound_model(tiny.CONFIG)
    seen: dict[int, Any] = {}
    ctx = ForwardContext(attend=dense_attention(1), see=seen.__setitem__)
    params = params_from_tensors(tiny.CONFIG, tiny.TENSORS)
    final, _ = model.bind(params)(jnp.asarray(LONG), jnp.arange(len(LONG)), None, None, ctx)
    wanted = states_of(LONG)
    for i, state in {**seen, 2: final}.items():
        np.testing.assert_allclose(state, wanted[i], rtol=2e-3, atol=2e-3)
    assert {*seen} == {0, 1}


@pytest.fixture(scope="module")
def layered(settings: dict[str, Any]) -> Iterator[jaxengine.Engine]:
    with jaxengine.Engine(**tiny.engine_arguments(), **settings, hidden_layers=(0, 2, 1)) as engine:
        yield engine


@pytest.mark.nightly
def test_of_chosen_layers(layered: Any):
    """In the order asked for; 0 is the embeddings, 2 of 2 layers is after the final norm."""
    output = layered.generate(
        input_ids=LONG, sampling_params={**GREEDY, "max_new_tokens": 9}, return_hidden_states=True
    )
    states = states_of([*LONG, *output["output_ids"]])
    wanted = np.stack([states[0], states[2], states[1]], axis=1)
    assert hidden(output).shape == wanted.shape == (99, 3, tiny.CONFIG.hidden_size)
    np.testing.assert_allclose(hidden(output), wanted, rtol=2e-3, atol=2e-3)


def test_bad_wishes_are_refused(engine: Any, arguments: dict[str, Any]):
    with pytest.raises(RequestError, match='`return_hidden_states` must be True, False, "last"'):
        engine.generate(input_ids=OTHER, return_hidden_states="first")
    with pytest.raises(RequestError, match="`hidden_states_format` must be one of numpy, sglang"):
        engine.generate(input_ids=OTHER, return_hidden_states=True, hidden_states_format="list")
    with pytest.raises(ConfigError, match=r"`hidden_layers` must be in \[0, 2\], got \(3,\)"):
        jaxengine.Engine(**arguments, hidden_layers=(3,))
