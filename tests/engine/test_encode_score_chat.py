"""Embeddings, label scores and conversations, on the engine that generates."""

import asyncio
from typing import Any

import numpy as np
import pytest

from jaxengine.errors import RequestError
from tests.engine import tiny

PROMPTS = tiny.prompts_of(9, 70, 33, seed=21)
QUERY, *ITEMS = tiny.prompts_of(40, 3, 5, 7, seed=22)
LABELS = [5, 9, 300]
TEMPLATE = (
    "<s>{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}</s><assistant>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on"},
]


def final_states(ids: list[int]) -> np.ndarray:
    embeds = tiny.embeddings(tiny.TENSORS, ids)
    return tiny.hidden_states(tiny.TENSORS, tiny.CONFIG, embeds)[-1]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_pooled_states(engine: Any, pooling: str, normalize: bool):
    outputs = engine.encode(input_ids=PROMPTS, pooling=pooling, normalize=normalize)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        states = final_states(prompt)
        wanted = states[-1] if pooling == "last" else states.mean(axis=0)
        wanted = wanted / np.linalg.norm(wanted) if normalize else wanted
        np.testing.assert_allclose(output["embedding"], wanted, rtol=2e-3, atol=2e-3)
        assert output["meta_info"]["prompt_tokens"] == len(prompt)
        assert "hidden_states" not in output["meta_info"]


def test_encode_takes_texts_and_has_a_twin(engine: Any, tokenizer: Any):
    one = engine.encode("the cat")
    assert one["embedding"].shape == (32,) and one["embedding"].dtype == np.float32
    batch = asyncio.run(engine.async_encode(["the cat", "sat"]))
    np.testing.assert_allclose(batch[0]["embedding"], one["embedding"], rtol=1e-3, atol=1e-4)
    short = engine.encode("the cat", dimensions=4)["embedding"]
    cut = one["embedding"][:4]
    np.testing.assert_allclose(short, cut / np.linalg.norm(cut), rtol=1e-3, atol=1e-4)


def test_bad_poolings_are_refused(engine: Any):
    with pytest.raises(RequestError, match='`pooling` must be "mean" or "last", got \'max\''):
        engine.encode("the", pooling="max")
    with pytest.raises(RequestError, match=r"`dimensions` must be an integer in \[1, 32\]"):
        engine.encode("the", dimensions=33)


@pytest.mark.parametrize("apply_softmax", [True, False])
@pytest.mark.parametrize("item_first", [True, False])
def test_scores_are_probabilities_of_labels(engine: Any, apply_softmax: bool, item_first: bool):
    result = engine.score(QUERY, ITEMS, LABELS, apply_softmax, item_first)
    for item, got in zip(ITEMS, result, strict=True):
        prompt = item + QUERY if item_first else QUERY + item
        log_p = tiny.log_softmax(tiny.forward(tiny.TENSORS, tiny.CONFIG, prompt))[-1, LABELS]
        wanted = np.exp(log_p)
        wanted = wanted / wanted.sum() if apply_softmax else wanted
        np.testing.assert_allclose(got, wanted, rtol=1e-3)
    assert result == result.scores and type(result.scores) is list
    assert result.prompt_tokens == 3 * 40 + 15


def test_a_query_is_prefilled_once(engine: Any):
    query = tiny.prompts_of(64, seed=23)[0]
    before = engine.stats()
    engine.score(query, ITEMS, LABELS)
    after = engine.stats()
    assert after["num_cached_tokens"] - before["num_cached_tokens"] == 2 * 64
    assert after["num_prefill_tokens"] - before["num_prefill_tokens"] == 64 + 15


def test_scores_of_texts(engine: Any, tokenizer: Any):
    result = asyncio.run(engine.async_score("the cat", [" sat", " on"], LABELS))
    ids = tokenizer("the cat sat")["input_ids"]
    log_p = tiny.log_softmax(tiny.forward(tiny.TENSORS, tiny.CONFIG, ids))[-1, LABELS]
    np.testing.assert_allclose(result[0], np.exp(log_p), rtol=1e-3)
    assert len(result) == 2 and engine.score("the", [], LABELS) == []


@pytest.mark.parametrize(
    "call, words",
    [
        (("the", [[5]], LABELS), "both be text"),
        (([5], ["the"], LABELS), "both be token ids"),
        (("the", ["cat"], None), "`label_token_ids` must be given"),
        (("the", ["cat"], [384]), "vocabulary"),
    ],
)
def test_bad_scores_are_refused(engine: Any, call: tuple[Any, ...], words: str):
    with pytest.raises(RequestError, match=words):
        engine.score(*call)


def chat_ids(engine: Any, messages: Any, **arguments: Any) -> Any:
    """The prompt a conversation becomes."""
    output = engine.chat(
        messages,
        {"max_new_tokens": 1},
        chat_template=TEMPLATE,
        return_prompt_token_ids=True,
        **arguments,
    )
    return output["prompt_token_ids"]


def test_a_conversation_is_what_its_template_writes(engine: Any, tokenizer: Any):
    text = "<s><user>the cat</s><assistant>sat</s><user>on"
    written = tokenizer(text + "</s><assistant>", add_special_tokens=False)["input_ids"]
    assert chat_ids(engine, MESSAGES) == written
    open_ended = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_ids(engine, MESSAGES, add_generation_prompt=False) == open_ended
    assert chat_ids(engine, MESSAGES, continue_final_message=True) == open_ended
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assert tokenizer.decode(chat_ids(engine, MESSAGES, tools=[tool])).startswith("<s>[look]<user>")


def test_conversations_in_a_list_stream_and_await(engine: Any):
    params = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
    arguments = {"sampling_params": params, "chat_template": TEMPLATE}
    two = engine.chat([MESSAGES, MESSAGES[:1]], **arguments)
    alone = asyncio.run(engine.async_chat(MESSAGES, **arguments))
    *_, last = engine.chat(MESSAGES, stream=True, **arguments)
    assert two[0]["text"] == alone["text"] == last["text"] and len(two) == 2


def test_the_demo_models_own_template_adds_no_second_start(demo: Any):
    output = demo.chat(
        [{"role": "user", "content": "What news?"}],
        {"max_new_tokens": 1},
        return_prompt_token_ids=True,
    )
    text = demo.tokenizer.decode(output["prompt_token_ids"])
    assert text == "<|im_start|>user\nWhat news?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages, template, words",
    [
        ([], TEMPLATE, "`messages` must be a list of"),
        ("hello", TEMPLATE, "`messages` must be a list of"),
        ([{"content": "x"}], TEMPLATE, "`messages` must be a list of"),
        (MESSAGES, None, "no chat template"),
        (MESSAGES, "{{ raise_exception('no system here') }}", "no system here"),
    ],
)
def test_bad_conversations_are_refused(engine: Any, messages: Any, template: Any, words: str):
    with pytest.raises(RequestError, match=words):
        engine.chat(messages, chat_template=template)
