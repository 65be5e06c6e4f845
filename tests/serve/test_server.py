"""The server, over loopback, with OpenAI's own client."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn

from jaxengine.serve.server import Limits, make_app
from tests.engine.conftest import assert_idle, wait_for

PROMPT = "ROMEO:\nWhat light"
MESSAGES: Any = [{"role": "user", "content": "Who is Juliet?"}]
SEEDED = {"temperature": 0.8, "seed": 7, "max_tokens": 8}
"""OpenAI's names; `generate` calls the last one differently."""


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The app behind a port of its own; gives its address."""
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert wait_for(lambda: server.started)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def address(demo: Any) -> Iterator[str]:
    with serving(make_app(demo)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def request(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, response.read()


def test_completions_are_those_of_generate(demo: Any, client: openai.OpenAI):
    params = {**SEEDED, "n": 2}
    given = client.completions.create(model="demo", prompt=PROMPT, **params)
    params["max_new_tokens"] = params.pop("max_tokens")
    expected = demo.generate(PROMPT, params)
    assert [choice.text for choice in given.choices] == [output["text"] for output in expected]
    assert [choice.finish_reason for choice in given.choices] == ["length", "length"]
    assert given.usage and given.usage.completion_tokens == 16
    assert given.usage.prompt_tokens == expected[0]["meta_info"]["prompt_tokens"]
    ids = demo.tokenizer(PROMPT)["input_ids"]
    by_ids = client.completions.create(model="demo", prompt=ids, echo=True, **SEEDED)
    assert by_ids.choices[0].text == expected[0]["text"]
    echoed = client.completions.create(model="demo", prompt=PROMPT, echo=True, **SEEDED)
    assert echoed.choices[0].text == PROMPT + expected[0]["text"]


def test_chat_goes_through_the_template_and_streams_the_same(demo: Any, client: openai.OpenAI):
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, **SEEDED)
    text = demo.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = demo.generate(text, {"temperature": 0.8, "seed": 7, "max_new_tokens": 8})
    assert whole.choices[0].message.content == expected["text"]
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **SEEDED,
        )
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == expected["text"]
    assert [c.choices[0].finish_reason for c in pieces][-1] == "length"
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_samples_of_a_stream_are_told_apart(demo: Any, client: openai.OpenAI):
    texts = {0: "", 1: ""}
    stream = client.completions.create(model="demo", prompt=PROMPT, n=2, stream=True, **SEEDED)
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    params = {"temperature": 0.8, "seed": 7, "max_new_tokens": 8, "n": 2}
    assert list(texts.values()) == [output["text"] for output in demo.generate(PROMPT, params)]


def test_logprobs_in_both_forms_whole_and_streamed(demo: Any, client: openai.OpenAI):
    params = {"temperature": 0.8, "seed": 7, "max_new_tokens": 8}
    more = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    expected = demo.generate(PROMPT, params, **more)["meta_info"]
    told = [logprob for logprob, _, _ in expected["output_token_logprobs"]]
    given = client.completions.create(model="demo", prompt=PROMPT, logprobs=2, **SEEDED)
    logprobs = given.choices[0].logprobs
    assert logprobs and logprobs.token_logprobs == told
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 8
    assert logprobs.text_offset == [
        len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))
    ]
    chat: Any = {
        "model": "demo",
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 2,
        **SEEDED,
    }
    whole = client.chat.completions.create(**chat)
    content = whole.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [2] * 8
    told_text = "".join(entry.token for entry in content).removesuffix(demo.tokenizer.eos_token)
    assert told_text == whole.choices[0].message.content
    chunks: Any = client.chat.completions.create(**chat, stream=True)
    streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


def test_stop_strings_end_an_answer(demo: Any, client: openai.OpenAI):
    text = demo.generate(PROMPT, {"temperature": 0, "max_new_tokens": 30})["text"]
    stop = text[5:8]
    given = client.completions.create(
        model="demo", prompt=PROMPT, temperature=0, max_tokens=30, stop=[stop]
    )
    assert given.choices[0].text == text[: text.index(stop)]
    assert given.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -1}, "`temperature` must be"),
        ({"max_tokens": "many"}, "`max_new_tokens` must be"),
        ({"prompt": ["a", "b"]}, "`prompt` must be a text"),
        ({"extra_body": {"temprature": 1}}, "Unknown field `temprature`"),
        ({"suffix": "end"}, "`suffix` is not supported"),
        ({"prompt": "a " * 400}, "`context_length` is 256"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(
    client: openai.OpenAI, changes: dict[str, Any], message: str
):
    arguments: Any = {"model": "demo", "prompt": PROMPT, **changes}
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(**arguments)
    assert caught.value.type == "invalid_request_error"


def test_other_models_and_broken_bodies_are_refused(client: openai.OpenAI, address: str):
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt' here"):
        client.completions.create(model="gpt", prompt=PROMPT)
    assert [model.id for model in client.models.list()] == ["demo"]
    status, body = request(address, "POST", "/v1/completions", b"{")
    assert (status, "is not JSON" in body.decode()) == (400, True)


def test_a_client_that_leaves_stops_its_request(demo: Any, address: str, client: openai.OpenAI):
    before = demo.stats()["num_generated_tokens"]
    long: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 200}
    long["extra_body"] = {"ignore_eos": True}
    with client.completions.create(**long, stream=True) as stream:
        next(stream)
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as connection:  # and one that is not streamed
        body = {k: v for k, v in long.items() if k != "extra_body"} | {"n": 4, "ignore_eos": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        assert wait_for(lambda: demo.stats()["num_running"] > 0)
    assert_idle(demo)
    assert demo.stats()["num_generated_tokens"] - before < 5 * 200
    assert wait_for(lambda: b"aborted_total 2.0" in request(address, "GET", "/metrics")[1])


def test_health_and_metrics(demo: Any, address: str, client: openai.OpenAI):
    assert request(address, "GET", "/health") == (200, b'{"status":"ok"}')
    client.completions.create(model="demo", prompt=PROMPT, max_tokens=2)
    lines = request(address, "GET", "/metrics")[1].decode().splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(told["jaxengine_generated_tokens_total"]) <= demo.stats()["num_generated_tokens"]
    assert float(told['jaxengine_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(told["jaxengine_time_to_first_token_seconds_count"]) >= 1


def test_guards_hold(demo: Any):
    limits = Limits(api_key="secret", max_body_bytes=1000, requests_per_minute=8)
    with serving(make_app(demo, limits=limits)) as address:
        key: Any = {"Authorization": "Bearer secret"}
        small = b'{"prompt": "a", "max_tokens": 1}'
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status, body = request(address, "POST", "/v1/completions", small, **headers)
            assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")
        assert request(address, "POST", "/v1/completions", small, **key)[0] == 200
        assert request(address, "GET", "/metrics")[0] == 401
        assert request(address, "GET", "/health")[0] == 200
        large = json.dumps({"prompt": "a" * 2000}).encode()
        assert request(address, "POST", "/v1/completions", large, **key)[0] == 413
        chunked = {**key, "Transfer-Encoding": "chunked"}
        pieces = b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large)
        assert request(address, "POST", "/v1/completions", pieces, **chunked)[0] == 413
        statuses = [request(address, "GET", "/v1/models", **key)[0] for _ in range(10)]
        assert statuses.count(200) >= 1
        assert statuses[-1] == 429


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_200_streams_at_once_are_each_their_own(demo: Any, address: str):
    params: Any = {"temperature": 0.8, "max_tokens": 24, "seed": 3}
    prompts = [f"{PROMPT} {i}" for i in range(200)]

    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(model="demo", prompt=prompt, stream=True, **params)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def run() -> list[str]:
        base = f"http://{address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", timeout=500) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    alone = {"temperature": 0.8, "max_new_tokens": 24, "seed": 3, "seed_mode": "exact"}
    assert asyncio.run(run()) == [output["text"] for output in demo.generate(prompts, alone)]
    assert_idle(demo)
