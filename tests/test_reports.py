"""Logprobs of an output: arrays until they are read, then plain lists, whoever reads them."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxengine.reports import MetaInfo, Reports
from jaxengine.types import SequenceUpdate
from tests.fake_runner import make_request

LISTS = {
    "output_token_logprobs": [(-1.0, 3, None), (-2.0, 4, None)],
    "output_top_logprobs": [[(-0.5, 7, None), (-1.0, 3, None)], [(-2.0, 4, None), (-3.0, 1, None)]],
    "output_token_raw_logprobs": [-1.5, -2.5],
    "output_token_processed_logprobs": [-0.25, -0.75],
    "input_token_logprobs": [],
    "input_top_logprobs": [],
}
PLAIN = {"id": "a request", **LISTS}


def leaves() -> dict[str, np.ndarray]:
    """Of a step that drew two tokens and lists more of the most likely than were asked for."""
    return {
        "token": np.asarray([3, 4], np.int32),
        "logprob": np.asarray([-1.0, -2.0], np.float32),
        "raw_logprob": np.asarray([-1.5, -2.5], np.float32),
        "processed_logprob": np.asarray([-0.25, -0.75], np.float32),
        "top_logprobs": np.asarray([[-0.5, -1.0, -9.0], [-2.0, -3.0, -9.0]], np.float32),
        "top_ids": np.asarray([[7, 3, 9], [4, 1, 9]], np.int32),
    }


def reports(decode: Callable[[int], str] | None = None) -> Reports:
    request = make_request(0, 3, 9, wants_logprobs=True, num_top_logprobs=2)
    collected = Reports(request, decode)
    collected.push(SequenceUpdate(0, [3, 4], leaves()))
    return collected


def meta_info() -> MetaInfo:
    return MetaInfo({"id": "a request"}, reports().logprobs(0))


def call(**items: Any) -> dict[str, Any]:
    return items


READERS: dict[str, Callable[[MetaInfo], Any]] = {
    "dict": dict,
    "unpacked": lambda meta: {**meta},
    "keywords": lambda meta: call(**meta),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "its copy": lambda meta: meta.copy(),
    "pickle": lambda meta: pickle.loads(pickle.dumps(meta)),
    "or": lambda meta: meta | {},
    "or, from the right": lambda meta: {} | meta,
    "update": lambda meta: updated({}, meta),
    "update in place": lambda meta: dict(updated(meta, meta_info())),
    "items": lambda meta: dict(meta.items()),
    "values": lambda meta: dict(zip(meta, meta.values(), strict=True)),
    "get": lambda meta: {name: meta.get(name) for name in meta.keys()},
    "get, the default": lambda meta: meta.get("nothing", PLAIN),
    "setdefault": lambda meta: {name: meta.setdefault(name, 5) for name in meta},
    "pop": lambda meta: {name: meta.pop(name) for name in list(meta)},
    "popitem": lambda meta: dict(reversed([meta.popitem() for _ in range(len(meta))])),
    "repr": lambda meta: eval(repr(meta)),
}


def updated(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    one.update(other)
    return one


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_way_to_read_it_finds_plain_lists(read: Callable[[MetaInfo], Any]):
    got = read(meta_info())
    assert type(got) is dict and list(got) == list(PLAIN)
    assert got == PLAIN
    assert all(type(got[name]) is list for name in LISTS)


def test_equal_to_a_dict_and_to_another():
    assert meta_info() == PLAIN and meta_info() == PLAIN
    assert meta_info() == meta_info()
    assert meta_info() != {**PLAIN, "id": "another"}


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"sort_keys": True}])
def test_json_is_that_of_a_dict(how: dict[str, Any]):
    assert json.dumps([meta_info()], **how) == json.dumps([PLAIN], **how)


def test_asking_for_a_name_makes_no_list():
    meta = meta_info()
    assert "output_top_logprobs" in meta and len(meta) == len(PLAIN)
    assert type(dict.__getitem__(meta, "output_top_logprobs")) is not list


def test_arrays_hold_the_same_numbers():
    meta = meta_info()
    for _ in range(2):  # before the lists are made, and after
        top = meta.arrays("output_top_logprobs")
        np.testing.assert_array_equal(top.logprobs, leaves()["top_logprobs"][:, :2])
        np.testing.assert_array_equal(top.ids, leaves()["top_ids"][:, :2])
        raw = meta.arrays("output_token_raw_logprobs")
        assert raw.logprobs.tolist() == meta["output_token_raw_logprobs"]
        assert raw.ids.tolist() == [3, 4]
        assert meta.arrays("input_token_logprobs").logprobs.shape == (0,)
        assert meta == PLAIN
    with pytest.raises(KeyError):
        meta.arrays("id")


def test_outputs_of_a_stream_keep_their_length_and_make_an_item_once():
    texts: list[int] = []

    def decode(token_id: int) -> str:
        texts.append(token_id)
        return str(token_id)

    collected = reports(decode)
    early = MetaInfo({}, collected.logprobs(0))
    collected.push(SequenceUpdate(0, [3, 4], leaves()))
    late, new = MetaInfo({}, collected.logprobs(0)), MetaInfo({}, collected.logprobs(2))
    name = "output_token_logprobs"
    assert not texts
    assert late[name] == 2 * [(-1.0, 3, "3"), (-2.0, 4, "4")]
    assert early[name] == new[name] == late[name][2:]
    assert early.arrays(name).ids.tolist() == [3, 4]
    assert texts == [3, 4, 3, 4]


def test_what_is_cut_is_gone_from_later_outputs_only():
    collected = reports()
    before = MetaInfo({}, collected.logprobs(0))
    collected.cut(1)
    after = MetaInfo({}, collected.logprobs(0))
    for name, whole in LISTS.items():
        assert before[name] == whole and after[name] == whole[:1]
    assert after.arrays("output_top_logprobs").ids.tolist() == [[7, 3]]
