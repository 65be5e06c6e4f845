"""Merging helpers: right also when the model repeats itself."""

import asyncio

from jaxengine.utils import async_stream_and_merge, stream_and_merge

DELTAS = ["ha", "ha", "", "a", "ha"]


class Engine:
    """Streams `DELTAS` with cumulative text, and notes when a stream is closed."""

    def __init__(self):
        self.calls = []
        self.num_closed = 0

    def generate(self, prompt, sampling_params, *, stream):
        self.calls.append((prompt, sampling_params, stream))
        try:
            for i, delta in enumerate(DELTAS):
                yield {"text": "".join(DELTAS[: i + 1]), "delta_text": delta}
        finally:
            self.num_closed += 1

    async def async_generate(self, prompt, sampling_params, *, stream):
        async def chunks():
            for chunk in (iterator := self.generate(prompt, sampling_params, stream=stream)):
                try:
                    yield chunk
                except GeneratorExit:
                    iterator.close()
                    raise

        return chunks()


def test_stream_and_merge_keeps_repeats():
    engine = Engine()
    assert stream_and_merge(engine, "p", {"temperature": 0}) == "hahaaha"
    assert engine.calls == [("p", {"temperature": 0}, True)]
    assert engine.num_closed == 1


def test_async_stream_and_merge_keeps_repeats():
    async def collect():
        return [delta async for delta in async_stream_and_merge(Engine(), "p", {})]

    assert asyncio.run(collect()) == ["ha", "ha", "a", "ha"]


def test_closing_the_merged_stream_closes_the_engines():
    engine = Engine()

    async def take_one():
        merged = async_stream_and_merge(engine, "p", {})
        assert await anext(merged) == "ha"
        await merged.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    asyncio.run(take_one())
    assert engine.num_closed == 1
