"""Noise is a function of seed and position: not of the batch, the window, or preemption."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.engine import tiny

SAMPLED = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 40, "ignore_eos": True}
PROMPTS = tiny.prompts_of(5, 30, 64, 17, 90, 3, seed=9)


def ids_of(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["output_ids"] for output in outputs]


@pytest.fixture(scope="module")
def alone(engine: Any) -> list[list[int]]:
    """Each prompt's tokens with seed 100 + its index, one request at a time."""
    return [generate_one(engine, i) for i in range(len(PROMPTS))]


def generate_one(engine: Any, i: int, **params: Any) -> list[int]:
    params = {**SAMPLED, **params, "seed": 100 + i}
    return engine.generate(input_ids=PROMPTS[i], sampling_params=params)["output_ids"]


def test_same_seed_gives_the_same_and_another_does_not(engine: Any, alone: list[list[int]]):
    assert [generate_one(engine, i) for i in range(len(PROMPTS))] == alone
    others = {**SAMPLED, "seed": 1}
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=others)["output_ids"] != alone[0]
    alias = {**SAMPLED, "sampling_seed": 100}
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=alias)["output_ids"] == alone[0]


@pytest.mark.parametrize("order_seed", [0, 1, 2])
def test_seeded_tokens_do_not_depend_on_the_batch(
    engine: Any, alone: list[list[int]], order_seed: int
):
    order = [*range(len(PROMPTS))] * 2
    random.Random(order_seed).shuffle(order)
    with ThreadPoolExecutor(len(order)) as pool:
        outputs = list(pool.map(lambda i: generate_one(engine, i), order))
    assert outputs == [alone[i] for i in order]


def test_seeded_tokens_survive_preemption(engine: Any):
    params = {**SAMPLED, "max_new_tokens": 110, "seed": 3}
    outputs = engine.generate(input_ids=PROMPTS[:4], sampling_params=params)
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    for prompt, output in zip(PROMPTS[:4], outputs, strict=True):
        again = {**params, "seed": output["meta_info"]["seed"]}
        assert (
            engine.generate(input_ids=prompt, sampling_params=again)["output_ids"]
            == (output["output_ids"])
        )


def test_seeded_tokens_do_not_depend_on_the_windows(
    engine: Any, step_engine: Any, alone: list[list[int]]
):
    assert [generate_one(step_engine, i) for i in range(len(PROMPTS))] == alone
    for i, prompt in enumerate(PROMPTS):
        *_, last = engine.generate(
            input_ids=prompt, sampling_params={**SAMPLED, "seed": 100 + i}, stream=True
        )
        assert last["output_ids"] == alone[i]


def test_seeded_tokens_do_not_depend_on_what_else_runs(engine: Any, alone: list[list[int]]):
    """Greedy, penalised and unfiltered neighbours take other paths through the sampler."""
    neighbours = [
        {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True},
        {"max_new_tokens": 60, "ignore_eos": True, "repetition_penalty": 1.5},
        {"max_new_tokens": 60, "ignore_eos": True},
    ]

    async def run() -> list[dict[str, Any]]:
        tasks = [
            asyncio.ensure_future(engine.async_generate(input_ids=PROMPTS[5], sampling_params=p))
            for p in neighbours
        ]
        mine = await engine.async_generate(
            input_ids=PROMPTS[0], sampling_params={**SAMPLED, "seed": 100}
        )
        await asyncio.gather(*tasks)
        return [mine]

    assert ids_of(asyncio.run(run())) == alone[:1]


def test_reported_seed_replays_any_sample(engine: Any):
    params = {**SAMPLED, "n": 3, "seed": 7}
    outputs = engine.generate(input_ids=PROMPTS[:2], sampling_params=params)
    seeds = [output["meta_info"]["seed"] for output in outputs]
    assert seeds[0] == 7
    assert len(set(seeds)) == 6
    assert len({tuple(ids) for ids in ids_of(outputs)}) == 6
    for i, output in enumerate(outputs):
        replay = engine.generate(
            input_ids=PROMPTS[i // 3],
            sampling_params={**SAMPLED, "seed": output["meta_info"]["seed"]},
        )
        assert replay["output_ids"] == output["output_ids"]
    assert (
        engine.generate(input_ids=PROMPTS[:2], sampling_params=params)[4]["output_ids"]
        == (outputs[4]["output_ids"])
    )


def test_an_exact_seed_is_everyones(engine: Any):
    params = {**SAMPLED, "n": 2, "seed": 100, "seed_mode": "exact"}
    outputs = engine.generate(input_ids=[PROMPTS[0]] * 2, sampling_params=params)
    assert [output["meta_info"]["seed"] for output in outputs] == [100] * 4
    assert ids_of(outputs) == [generate_one(engine, 0)] * 4


def test_requests_without_a_seed_differ_and_replay(engine: Any):
    outputs = [
        engine.generate(input_ids=PROMPTS[0], sampling_params=SAMPLED),
        engine.generate(input_ids=PROMPTS[0], sampling_params=SAMPLED),
        *engine.generate(input_ids=[PROMPTS[0]] * 2, sampling_params={**SAMPLED, "n": 2}),
    ]
    assert len({output["meta_info"]["seed"] for output in outputs}) == 6
    assert len({tuple(ids) for ids in ids_of(outputs)}) == 6
    for output in outputs:
        seed = output["meta_info"]["seed"]
        again = engine.generate(input_ids=PROMPTS[0], sampling_params={**SAMPLED, "seed": seed})
        assert again["output_ids"] == output["output_ids"]


def test_random_seed_of_the_engine_makes_a_whole_run_repeatable(make_engine: Any):
    runs = []
    for _ in range(2):
        one = make_engine(random_seed=3, skip_tokenizer_init=True)
        runs.append([one.generate(input_ids=PROMPTS[0], sampling_params=SAMPLED) for _ in range(2)])
    assert ids_of(runs[0]) == ids_of(runs[1])
    assert runs[0][0]["output_ids"] != runs[0][1]["output_ids"]


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda filters: "+".join(filters),
)
def test_drawn_tokens_pass_the_filters(engine: Any, filters: dict[str, Any]):
    temperature = 2.0
    params = {**SAMPLED, "top_p": 1.0, **filters, "temperature": temperature, "n": 4}
    for output in engine.generate(input_ids=PROMPTS[1], sampling_params=params):
        ids = output["output_ids"]
        logits = tiny.step_logits(PROMPTS[1], ids) / temperature
        drawn = np.arange(len(ids)), ids
        probs = np.exp(tiny.log_softmax(logits))
        rank = (probs > probs[drawn][:, None]).sum(axis=-1)
        mass_above = np.where(probs > probs[drawn][:, None], probs, 0).sum(axis=-1)
        assert (rank < filters.get("top_k", 1 << 30)).all()
        assert (mass_above < filters.get("top_p", 1.0) + 1e-4).all()
        assert (probs[drawn] > filters.get("min_p", 0.0) * probs.max(axis=-1) - 1e-4).all()
        assert (rank > 0).any()  # it is a draw
