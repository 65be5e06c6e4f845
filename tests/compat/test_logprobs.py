"""What SGLang asserts of logprobs.

After test/registered/core/test_srt_endpoint.py (`logprob_*`) and
sampling/test_original_logprobs.py; the oracle is a plain numpy forward, and transformers' logits.
"""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.compat.shim import GOLDEN, generate
from tests.engine import tiny

PROMPT = tiny.prompts_of(20, seed=51)[0]
NUM_NEW = 6


def values(triples: list[Any]) -> np.ndarray:
    return np.asarray([value for value, *_ in triples], np.float64)


@pytest.mark.parametrize("start", [-1, 0, 1, 5, 19, 20])
@pytest.mark.parametrize("top", [0, 3])
def test_lengths_for_every_start(engine: Any, start: int, top: int):
    """`run_logprob_check`: lengths of all lists, and the sampled token among the best if greedy."""
    params = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    meta = generate(
        engine,
        {
            "input_ids": PROMPT,
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": top,
        },
    )["meta_info"]
    num_input = 0 if start == -1 else len(PROMPT) - start
    assert len(meta["input_token_logprobs"]) == num_input
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"] == NUM_NEW
    if not top:
        assert "output_top_logprobs" not in meta
        return
    assert len(meta["input_top_logprobs"]) == num_input
    for token, tops in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert len(tops) == top
        assert tops[0][1] == token[1] and tops[0][0] == pytest.approx(token[0], abs=1e-5)
        assert values(tops).tolist() == sorted(values(tops), reverse=True)


def test_a_mixture_in_one_batch(engine: Any):
    """`test_logprob_mixed`: starts, tops and whether there are any, all mixed."""
    wishes = [(False, -1, 0), *itertools.product([True], [-1, 0, 7], [0, 2])]
    random.Random(0).shuffle(wishes)
    outputs = engine.generate(
        input_ids=[PROMPT] * len(wishes),
        sampling_params={"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True},
        return_logprob=[wish[0] for wish in wishes],
        logprob_start_len=[wish[1] for wish in wishes],
        top_logprobs_num=[wish[2] for wish in wishes],
    )
    for (wanted, start, top), output in zip(wishes, outputs, strict=True):
        meta = output["meta_info"]
        assert ("output_token_logprobs" in meta) == wanted
        if wanted:
            num_input = 0 if start == -1 else len(PROMPT) - start
            assert len(meta["input_token_logprobs"]) == num_input
            assert ("output_top_logprobs" in meta) == bool(top)


def test_decode_and_prefill_agree(engine: Any):
    """`test_logprob_match`: what was drawn has the same logprobs as a prompt (SGLang: 0.35)."""
    params = {"temperature": 1, "max_new_tokens": 30, "ignore_eos": True, "seed": 3}
    output = engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    drawn = output["meta_info"]["output_token_logprobs"]
    meta = engine.generate(
        input_ids=PROMPT + output["output_ids"],
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=len(PROMPT),
    )["meta_info"]
    assert [t for _, t, _ in meta["input_token_logprobs"]] == output["output_ids"]
    np.testing.assert_allclose(values(meta["input_token_logprobs"]), values(drawn), atol=2e-3)


def test_of_the_tempered_and_of_the_models_own_distribution(engine: Any):
    """`test_original_logprobs`: both settings of SGLANG_RETURN_ORIGINAL_LOGPROB, side by side."""
    params = {"temperature": 0.5, "top_k": 10, "max_new_tokens": 12, "ignore_eos": True, "seed": 1}
    given = [4, 9, 200]
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params=params,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=5,
        token_ids_logprob=given,
    )
    ids, meta = output["output_ids"], output["meta_info"]
    logits = tiny.step_logits(PROMPT, ids)
    tempered, own = tiny.log_softmax(logits / 0.5), tiny.log_softmax(logits)
    drawn = range(len(ids)), ids
    np.testing.assert_allclose(values(meta["output_token_logprobs"]), tempered[drawn], atol=5e-3)
    np.testing.assert_allclose(meta["output_token_raw_logprobs"], own[drawn], atol=5e-3)
    for row, tops, some in zip(
        tempered, meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
    ):
        np.testing.assert_allclose(values(tops), np.sort(row)[::-1][:5], atol=5e-3)
        np.testing.assert_allclose(values(some), row[given], atol=5e-3)
    whole = tiny.log_softmax(tiny.forward(tiny.TENSORS, tiny.CONFIG, PROMPT))
    got = meta["input_token_logprobs"]
    assert got[0][0] is None and meta["input_top_logprobs"][0] is None
    wanted = whole[range(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(values(got[1:]), wanted, atol=5e-3)


def test_of_transformers(demo: Any):
    """Golden logits at some places of three texts: the best tokens and their logprobs."""
    golden = load_file(GOLDEN)
    for i in range(3):
        meta = demo.generate(
            input_ids=golden[f"input_ids.{i}"].tolist(),
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=5,
        )["meta_info"]
        tops = [*meta["input_top_logprobs"][1:], meta["output_top_logprobs"][0]]
        for position, logits in zip(golden[f"positions.{i}"], golden[f"logits.{i}"], strict=True):
            wanted = np.sort(tiny.log_softmax(logits))[::-1][:5]
            np.testing.assert_allclose(values(tops[position]), wanted, atol=0.05)
