"""A thin OpenAI-compatible server over an engine: FastAPI routes, nothing more."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from jaxengine.errors import EngineDeadError, RequestError
from jaxengine.serve import openai_api
from jaxengine.serve.guard import BodyTooLargeError, Guard, Limits
from jaxengine.serve.metrics import Metrics

ABORT_REASONS = (asyncio.CancelledError, GeneratorExit)


def make_app(engine: Any, *, model: str = "", limits: Limits | None = None) -> Any:
    """The server as an ASGI app; the engine stays the caller's.

    Args:
      engine: A `jaxengine.Engine` with a tokenizer.
      model: Name of the model; the engine's `served_model_name`, or its folder's, when empty.
      limits: Key, sizes and rates.
    """
    name = model or engine.config.served_model_name or Path(engine.config.model_path).name
    server = _Server(engine, name or "model")
    app = FastAPI(title="jaxengine", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", server.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", server.metrics_text, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", server.models, methods=["GET"], response_model=None)
    for path in (openai_api.CHAT, openai_api.COMPLETION):
        app.add_api_route(path, server.generate, methods=["POST"], response_model=None)
    return Guard(app, limits or Limits())


class _Server:
    """The routes."""

    def __init__(self, engine: Any, model: str) -> None:
        self._engine = engine
        self._model = model
        self._created = int(time.time())
        self._metrics = Metrics(engine.stats)

    async def health(self) -> Response:
        """200 while the engine answers."""
        is_alive = self._engine.is_alive
        content = {"status": "ok" if is_alive else "the engine stopped"}
        return JSONResponse(content, status_code=200 if is_alive else 503)

    async def metrics_text(self) -> Response:
        """Prometheus's text format."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model there is."""
        entry = {"id": self._model, "object": "model", "created": self._created}
        entry |= {"owned_by": "jaxengine", "max_model_len": self._engine.config.context_length}
        return JSONResponse({"object": "list", "data": [entry]})

    async def generate(self, request: Request) -> Response:
        """Chat and plain completions, whole or streamed."""
        path, started = request.url.path, time.perf_counter()
        try:
            response = await self._answer(request, path, started)
        except BodyTooLargeError as error:
            response = _error(413, str(error), "invalid_request_error")
        except EngineDeadError as error:
            response = _error(503, str(error), "server_error")
        except (RequestError, TypeError) as error:
            response = _error(400, str(error), "invalid_request_error")
        except Exception as error:  # a step that failed; the engine goes on
            response = _error(500, str(error), "server_error")
        self._metrics.requests.labels(path, response.status_code).inc()
        return response

    async def _answer(self, request: Request, path: str, started: float) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError as error:
            raise RequestError(f"The body is not JSON: {error}.") from error
        parsed = openai_api.parse(path, body, self._engine.tokenizer)
        if parsed.model not in ("", self._model):
            message = f"There is no model {parsed.model!r} here; `model` may be {self._model!r}."
            return _error(404, message, "invalid_request_error", "model_not_found")
        prefix = "chatcmpl" if path == openai_api.CHAT else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        head["model"] = self._model
        stream = await self._engine.async_generate(**parsed.arguments, stream=True)
        if parsed.stream:
            frames = self._frames(stream, parsed, head, started)
            return StreamingResponse(frames, media_type="text/event-stream")
        outputs = await self._collect(request, stream, started)
        if outputs is None:
            return Response(status_code=499)
        self._metrics.request_s.observe(time.perf_counter() - started)
        return JSONResponse(openai_api.answer(parsed, outputs, **head))

    async def _collect(
        self, request: Request, stream: Any, started: float
    ) -> list[dict[str, Any]] | None:
        """All samples' final outputs; None where the client left, which aborts them."""

        async def read() -> list[dict[str, Any]]:
            last: dict[int, dict[str, Any]] = {}
            async for output in stream:
                if not last:
                    self._metrics.first_token_s.observe(time.perf_counter() - started)
                last[output.get("index", 0)] = output
            return [last[i] for i in sorted(last)]

        reading = asyncio.create_task(read())
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            self._metrics.aborted.inc()
            return None
        finally:
            stream.close()
            reading.cancel()
            leaving.cancel()

    async def _frames(
        self, stream: Any, parsed: openai_api.Request, head: dict[str, Any], started: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events; closing it aborts the request."""
        num_told: dict[int, int] = {}
        last: dict[int, dict[str, Any]] = {}
        try:
            async for output in stream:
                if not last:
                    self._metrics.first_token_s.observe(time.perf_counter() - started)
                index = output.get("index", 0)
                is_first = index not in last
                last[index] = output
                text = (parsed.echo if is_first else "") + output["delta_text"]
                yield _event(
                    openai_api.chunk(
                        parsed,
                        output,
                        **head,
                        index=index,
                        text=text,
                        num_before=num_told.get(index, 0),
                        is_first=is_first,
                    )
                )
                num_told[index] = len(output["output_ids"])
        except ABORT_REASONS:
            self._metrics.aborted.inc()
            raise
        except Exception as error:  # the status has been sent
            yield _event(openai_api.error_body(str(error), "server_error"))
            return
        finally:
            stream.close()
        if parsed.wants_usage:
            frame = openai_api.chunk(parsed, None, **head)
            yield _event({**frame, "usage": openai_api.usage([last[i] for i in sorted(last)])})
        yield b"data: [DONE]\n\n"
        self._metrics.request_s.observe(time.perf_counter() - started)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _error(status: int, message: str, kind: str, code: str | None = None) -> Response:
    body = openai_api.error_body(message, kind)
    body["error"]["code"] = code
    return JSONResponse(body, status_code=status)
