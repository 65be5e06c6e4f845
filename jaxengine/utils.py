"""Helpers around a streaming engine, under SGLang's names. Knows only what a chunk looks like."""

from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class StreamingEngine(Protocol):
    """What `jaxengine.Engine` has, as far as it is needed here."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """With `stream=True`: a generator of chunks."""
        ...

    async def async_generate(self, *args: Any, **kwargs: Any) -> Any:
        """With `stream=True`: gives an async generator of chunks."""
        ...


def stream_and_merge(engine: StreamingEngine, prompt: str, sampling_params: Any = None) -> str:
    """Streams one prompt's continuation and returns it whole.

    Chunks are joined by what each adds, so a text that repeats itself stays as it is.

    Args:
      engine: A `jaxengine.Engine`.
      prompt: One prompt.
      sampling_params: As `Engine.generate` takes them, with `n` 1.
    """
    with closing(engine.generate(prompt, sampling_params, stream=True)) as chunks:
        return "".join(chunk["delta_text"] for chunk in chunks)


async def async_stream_and_merge(
    engine: StreamingEngine, prompt: str, sampling_params: Any = None
) -> AsyncIterator[str]:
    """Yields what each chunk adds to one prompt's continuation; closing it aborts the request.

    Args:
      engine: A `jaxengine.Engine`.
      prompt: One prompt.
      sampling_params: As `Engine.generate` takes them, with `n` 1.
    """
    stream = await engine.async_generate(prompt, sampling_params, stream=True)
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            if chunk["delta_text"]:
                yield chunk["delta_text"]
