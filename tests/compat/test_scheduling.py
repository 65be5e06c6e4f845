"""What SGLang asserts of its prefix cache, of aborts, and of how calls are laid out.

After test/registered/radix_cache: test_radix_cache_hit.py, test_radix_attention.py;
scheduler/test_scheduler_control.py; core/test_io_struct.py.
"""

import random
import threading
from typing import Any

import pytest

from jaxengine.errors import RequestError
from tests.engine import tiny

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PAGE = 16


def cached(output: dict[str, Any]) -> int:
    return output["meta_info"]["cached_tokens"]


def test_cached_tokens_are_exact(engine: Any):
    """The first time none, then all full pages but for the last token."""
    prompt = tiny.prompts_of(100, seed=71)[0]
    outputs = [engine.generate(input_ids=prompt, sampling_params=GREEDY) for _ in range(2)]
    assert [cached(output) for output in outputs] == [0, 99 // PAGE * PAGE]
    longer = engine.generate(input_ids=[*prompt[:50], 5], sampling_params=GREEDY)
    assert cached(longer) == 48
    with_logprobs = engine.generate(
        input_ids=prompt, sampling_params=GREEDY, return_logprob=True, logprob_start_len=40
    )
    assert cached(with_logprobs) == 39 // PAGE * PAGE


def test_outputs_are_cached_for_the_next_turn(engine: Any):
    prompt = tiny.prompts_of(20, seed=72)[0]
    first = engine.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 30})
    turn = prompt + first["output_ids"] + [7, 8]
    second = engine.generate(input_ids=turn, sampling_params=GREEDY)
    assert cached(second) == (20 + 30 - 1) // PAGE * PAGE
    tiny.assert_greedy(turn, second["output_ids"])


def test_random_trees_of_turns(engine: Any):
    """`test_radix_attention.py`: texts that branch again and again answer as if alone."""
    rng = random.Random(0)
    texts = [tiny.prompts_of(24, seed=73)[0]]
    for _ in range(4):
        branches = [rng.choice(texts) + rng.choices(range(2, 300), k=9) for _ in range(5)]
        outputs = engine.generate(input_ids=branches, sampling_params=GREEDY)
        for text, output in zip(branches, outputs, strict=True):
            tiny.assert_greedy(text, output["output_ids"])
        texts += [t + o["output_ids"] for t, o in zip(branches, outputs, strict=True)]
        texts = [text for text in texts if len(text) < 150]
    assert engine.stats()["cache_hit_rate"] > 0


def test_abort_by_id_gives_what_there_is(engine: Any):
    prompt = tiny.prompts_of(10, seed=74)[0]
    params = {"max_new_tokens": 200, "ignore_eos": True}
    stream = engine.generate(input_ids=prompt, sampling_params=params, rid="r_1", stream=True)
    other = engine.generate(input_ids=prompt, sampling_params=params, rid="r_10", stream=True)
    first = next(stream)
    engine.abort("r_1")
    *_, last = [first, *stream]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < last["meta_info"]["completion_tokens"] < 200 and last["meta_info"]["id"] == "r_1"
    assert last["meta_info"]["prompt_tokens"] == 10
    *_, whole = other
    assert whole["meta_info"]["completion_tokens"] == 200, "SGLang matches ids by their beginning"


def test_a_duplicate_id_is_refused(engine: Any):
    stream = engine.generate(
        input_ids=[5, 6], sampling_params={"max_new_tokens": 200}, rid="same", stream=True
    )
    with pytest.raises(RequestError, match="`rid` 'same' is already in flight"):
        engine.generate(input_ids=[5, 6], rid="same")
    stream.close()


def test_ids_of_a_batch(engine: Any):
    """One id is numbered; samples share theirs; fresh ones differ."""
    prompts = tiny.prompts_of(3, 4, seed=75)

    def ids(**arguments: Any) -> list[str]:
        outputs = engine.generate(
            input_ids=prompts,
            sampling_params={"max_new_tokens": 1, **arguments.pop("params", {})},
            **arguments,
        )
        return [output["meta_info"]["id"] for output in outputs]

    assert ids(rid="x") == ["x_0", "x_1"]
    assert ids(rid=["a", "b"]) == ["a", "b"]
    assert ids(rid="x", params={"n": 2}) == ["x_0", "x_0", "x_1", "x_1"]
    assert len({*ids(), *ids()}) == 4


def test_lists_spread_over_prompts(engine: Any):
    """`test_io_struct.py`: one value for all, or one each; other lengths are refused."""
    prompts = tiny.prompts_of(3, 4, seed=76)
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
    outputs = engine.generate(
        input_ids=prompts, sampling_params=params, return_logprob=[True, False]
    )
    assert [o["meta_info"]["completion_tokens"] for o in outputs] == [1, 2]
    assert ["output_token_logprobs" in o["meta_info"] for o in outputs] == [True, False]
    with pytest.raises(RequestError, match="`sampling_params` has 2 entries for 1 prompts"):
        engine.generate(input_ids=prompts[:1], sampling_params=params)
    assert isinstance(engine.generate(input_ids=prompts[:1], sampling_params=params[0]), list)


def test_requests_that_come_while_others_run(engine: Any):
    """The stress kit in small: threads with prompts of all lengths, each answered as if alone."""
    rng = random.Random(1)
    prompts = tiny.prompts_of(*[rng.randint(1, 60) for _ in range(12)], seed=77)
    answers: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        answers[i] = engine.generate(input_ids=prompts[i], sampling_params=GREEDY)["output_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        tiny.assert_greedy(prompt, answers[i])
