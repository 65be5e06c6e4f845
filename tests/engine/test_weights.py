"""Weights that change in a running engine, and memory that is given back and taken again."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxengine
from jaxengine.errors import RequestError, WeightsError
from tests.engine import tiny
from tests.oracle import params_from_tensors

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
LONG = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
PROMPT, OTHER = tiny.prompts_of(40, 9, seed=31)
OLD = tiny.TENSORS
NEW = tiny.random_tensors(seed=1)


@pytest.fixture(scope="module")
def live(settings: dict[str, Any], tokenizer: Any) -> Iterator[jaxengine.Engine]:
    """An engine of these tests' own: its weights change."""
    with jaxengine.Engine(**tiny.engine_arguments(), tokenizer=tokenizer, **settings) as engine:
        yield engine


@pytest.fixture(autouse=True)
def old_weights(live: Any) -> None:
    live.update_weights(params_from_tensors(tiny.CONFIG, OLD), version="old")


def outcome(engine: Any, prompt: list[int] = PROMPT) -> dict[str, Any]:
    return engine.generate(input_ids=prompt, sampling_params=GREEDY)


def assert_has(engine: Any, tensors: Any, version: str | None = None) -> None:
    output = outcome(engine)
    tiny.assert_greedy(PROMPT, output["output_ids"], tensors=tensors)
    if version is not None:
        assert output["meta_info"]["weight_version"] == version


def test_a_trainers_own_arrays_are_used_as_they_are(live: Any):
    params = params_from_tensors(tiny.CONFIG, NEW)
    outcome(live)
    live.update_weights(params, version="new")
    for ours, theirs in zip(jax.tree.leaves(live.params), jax.tree.leaves(params), strict=True):
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer(), "it was copied"
    output = outcome(live)
    assert output["meta_info"]["cached_tokens"] == 0, "the cache has keys of the old weights"
    assert "output_weight_versions" not in output["meta_info"]
    assert_has(live, NEW, "new")


def test_tensors_by_their_checkpoint_names(live: Any):
    on_device = {name: jax.numpy.asarray(NEW[name]) for name in ("lm_head.weight",)}
    live.update_weights({**NEW, **on_device})
    assert_has(live, NEW)


def test_some_tensors_leave_the_others(live: Any):
    """Two of the three that are one merged parameter here."""
    names = ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.bias"]
    some = {**OLD, **{name: NEW[name] for name in names}}
    assert live.update_weights_from_tensor([(name, NEW[name]) for name in names])[0]
    assert_has(live, some)
    for name in (*names, "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(live.get_weights_by_name(name), some[name][:100])
    assert live.get_weights_by_name("no.such") is None


def test_from_a_folder(live: Any, tmp_path: Path):
    folder = tiny.write_checkpoint(tmp_path / "new", NEW)
    assert live.update_weights_from_disk(str(folder))[0]
    assert live.get_model_info()["model_path"] == str(folder)
    assert_has(live, NEW)
    success, message, _ = live.update_weights_from_disk(str(tmp_path / "none"))
    assert not success and "not a folder" in message
    assert_has(live, NEW)


@pytest.mark.parametrize(
    "weights, words",
    [
        ({}, "must be a tree of arrays"),
        ({"lm_head.weight": OLD["lm_head.weight"]}, "missing: model.embed_tokens.weight"),
        ({**OLD, "x.weight": np.zeros(2)}, "1 unexpected: x.weight"),
        ({**OLD, "lm_head.weight": np.zeros((3, 2))}, r"lm_head.weight is \(3, 2\), expected"),
        ({**OLD, "model.norm.weight": np.zeros(32, int)}, "1 are no floats: model.norm.weight"),
        ({"embed": {"weight": np.zeros((2, 2))}}, "missing layers.0"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(live: Any, weights: Any, words: str):
    before = jax.tree.leaves(live.params)
    with pytest.raises(WeightsError, match=words):
        live.update_weights(weights)
    assert all(a is b for a, b in zip(jax.tree.leaves(live.params), before, strict=True))
    assert_has(live, OLD, "old")


def test_who_runs_ends_with_the_old_weights_and_who_comes_later_waits(live: Any):
    with ThreadPoolExecutor() as pool:
        stream = live.generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
        next(stream)
        update = pool.submit(live.update_weights, params_from_tensors(tiny.CONFIG, NEW))
        while not live._worker._waiting and not update.done():
            time.sleep(0.001)
        later = pool.submit(outcome, live, OTHER)
        *_, last = stream
        tiny.assert_greedy(PROMPT, last["output_ids"], tensors=OLD)
        assert last["meta_info"]["weight_version"] == "old"
        tiny.assert_greedy(OTHER, later.result()["output_ids"], tensors=NEW)
        update.result()


def test_who_runs_may_go_on_with_the_new_ones(live: Any):
    """The output projection alone changes, so keys and values are right for both."""
    head = {"lm_head.weight": NEW["lm_head.weight"]}
    stream = live.generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
    next(stream)
    live.update_weights(head, version="new", running="keep", partial=True)
    *_, last = stream
    ids, versions = last["output_ids"], last["meta_info"]["output_weight_versions"]
    assert len(versions) == len(ids) == 100 and last["meta_info"]["weight_version"] == "new"
    assert versions == sorted(versions, reverse=True) and {*versions} == {"old", "new"}
    for version, tensors in (("old", OLD), ("new", {**OLD, **head})):
        best = tiny.step_logits(PROMPT, ids, tensors=tensors).argmax(axis=-1)
        mine = [name == version for name in versions]
        assert best[mine].tolist() == np.asarray(ids)[mine].tolist()


def test_who_was_retracted_is_computed_anew_with_the_new_ones(live: Any):
    """Keys and values, too: from there on the text is that of the new weights alone."""
    stream = live.generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
    next(stream)
    live.pause("retract")
    live.update_weights(NEW, version="new")
    live.resume()
    *_, last = stream
    ids, versions = last["output_ids"], last["meta_info"]["output_weight_versions"]
    for version, tensors in (("old", OLD), ("new", NEW)):
        best = tiny.step_logits(PROMPT, ids, tensors=tensors).argmax(axis=-1)
        mine = [name == version for name in versions]
        assert sum(mine) and best[mine].tolist() == np.asarray(ids)[mine].tolist()


def test_pages_of_who_is_paused_in_place_stay(live: Any):
    stream = live.generate(input_ids=PROMPT, sampling_params=LONG, stream=True)
    next(stream)
    live.pause()
    with pytest.raises(RequestError, match="paused in place hold pages"):
        live.release_memory(["kv_cache"])
    live.resume()
    *_, last = stream
    tiny.assert_greedy(PROMPT, last["output_ids"])


def test_bad_arguments_are_refused(live: Any):
    with pytest.raises(RequestError, match='`running` must be "finish" or "keep"'):
        live.update_weights(OLD, running="wait")
    with pytest.raises(AttributeError, match="weights are not sent between processes"):
        live.update_weights_from_distributed(["x"], ["float32"], [(1,)])
    with pytest.raises(RequestError, match="`tags` must be among weights, kv_cache"):
        live.release_memory(["pages"])


@pytest.mark.parametrize("tags", [None, ["kv_cache"], ["weights"]])
def test_memory_comes_back_and_who_came_meanwhile_is_answered(live: Any, tags: Any):
    outcome(live)
    freed = live.release_memory(tags)
    sizes = {
        "weights": sum(leaf.nbytes for leaf in OLD.values()),
        # KV pages, and beside them a table row and int16 counts for each of 4 slots.
        "kv_cache": 16 * 16 * tiny.CONFIG.kv_bytes_per_token["float32"],
    }
    assert freed["kv_cache" if tags is None else tags[0]] >= sizes[(tags or ["kv_cache"])[0]]
    if tags != ["kv_cache"]:
        assert live.params is None
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(outcome, live)
        time.sleep(0.1)
        assert not waiting.done()
        live.resume_memory(tags)
        tiny.assert_greedy(PROMPT, waiting.result()["output_ids"])
    # Pages that stayed are those of the same weights.
    assert waiting.result()["meta_info"]["cached_tokens"] == (32 if tags == ["weights"] else 0)
    assert_has(live, OLD, "old")


def test_memory_comes_back_in_stages_under_sglangs_names(live: Any):
    live.release_memory_occupation()
    assert live.params is None
    live.resume_memory_occupation(["kv_cache"])
    assert live.params is None
    live.resume_memory_occupation(["weights"])
    assert_has(live, OLD, "old")


def test_weights_without_a_copy_must_be_sent(live: Any):
    live.release_memory(["weights"], keep_copy=False)
    with pytest.raises(WeightsError, match="released with keep_copy=False"):
        live.resume_memory(["weights"])
    with pytest.raises(WeightsError, match="all of them are needed"):
        live.update_weights({"lm_head.weight": NEW["lm_head.weight"]}, partial=True)
    live.update_weights(NEW)
    assert_has(live, NEW)
