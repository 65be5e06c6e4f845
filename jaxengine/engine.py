"""Engine: the public API. Text in and out, in one process, from any thread or event loop."""

import atexit
import dataclasses
import inspect
import os
import sys
import time
import weakref
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
)
from typing import Any, Unpack

from jaxengine import build as builder
from jaxengine import chat as chats
from jaxengine import pooling
from jaxengine.call import Call
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import RequestError
from jaxengine.generate_arguments import (
    GENERATE_PARAMETERS,
    GenerateArguments,
    RequestArguments,
    spelled_out,
)
from jaxengine.imap import Flow, aimap, imap, item_start
from jaxengine.locate import locate
from jaxengine.log import logger
from jaxengine.profiling import Profile
from jaxengine.progress import Progress
from jaxengine.residency import Residency
from jaxengine.sampling import Sampler, as_sampler, default_sampler
from jaxengine.sglang_names import CacheFlush, SGLangNames
from jaxengine.submit import Submitter
from jaxengine.text.detokenizer import Vocabulary
from jaxengine.text.tokenizer import load_tokenizer, set_chat_template
from jaxengine.weight_sources import WeightSources
from jaxengine.worker import Worker

SHUTDOWN_TIMEOUT_S = 60.0
"""Longest wait for a device step that is under way."""


_SETTINGS = {k: v for k, v in inspect.signature(EngineConfig).parameters.items() if k != "ignored"}


class Engine(SGLangNames):
    """An offline LLM engine with the interface of `sglang.Engine`.

    One process: no children, no ports, no signal handlers, no event-loop policy. Calls are safe
    from any thread and any event loop, notebook cells included; several engines may live side by
    side. While one lives, full collections of Python's garbage leave out what is older than its
    programs (`gc.freeze`): they would stop every call for a third of a second. Shut down an engine
    that a reference cycle holds, for nobody else collects it.

    >>> with Engine(model_path=jaxengine.DEMO_MODEL) as engine:
    ...     engine.generate("ROMEO:", {"temperature": 0, "max_new_tokens": 8})["text"]
    """

    @spelled_out(_SETTINGS)
    def __init__(
        self,
        model_path: str | os.PathLike[str] | EngineConfig = "",
        *,
        sampler: Any = None,
        params: dict[str, Any] | None = None,
        model_config: ModelConfig | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """Loads a model and starts the engine.

        Args:
          model_path: Folder of a checkpoint, a hub id, or a GGUF file; or a whole `EngineConfig`,
            as `EngineConfig.from_toml` reads a preset.
          sampler: What turns logits into tokens; SGLang's chain when None.
          params: The model's arrays, as `jaxengine.models` names them, instead of a checkpoint.
          model_config: Shape of `params`; needed with them.
          tokenizer: A Hugging Face tokenizer instead of the checkpoint's.
          **others: Fields of `EngineConfig`, which explains them, and other names of SGLang: see
            `jaxengine.engine_arguments`.

        Raises:
          TypeError: For a setting nobody knows.
          ConfigError: For a setting or checkpoint that does not fit.
          WeightsError: For tensors that do not fit the config.
          CapacityError: If the device has no room.
        """
        started = time.perf_counter()
        self._finalizer: weakref.finalize | None = None
        self._profile: Profile | None = None
        given = {"model_path": str(model_path)}
        if isinstance(model_path, EngineConfig):
            given = model_path.settings()
        config = EngineConfig.from_kwargs({**given, **settings})
        if (params is None) != (model_config is None):
            raise TypeError("`params` and `model_config` go together; pass both or neither.")
        if "log_level" in settings:
            logger.setLevel(config.log_level.upper())
        progress = sys.stderr.isatty() if config.progress is None else config.progress
        self.tokenizer = tokenizer
        if tokenizer is None and not config.skip_tokenizer_init and params is None:
            folder = config.tokenizer_path or locate(config)
            self.tokenizer = load_tokenizer(folder, config.trust_remote_code, config.revision)
        if self.tokenizer is not None:
            set_chat_template(self.tokenizer, config.chat_template, config.hf_chat_template_name)
        vocabulary = Vocabulary(self.tokenizer) if self.tokenizer is not None else None
        own = default_sampler() if sampler is None else as_sampler(sampler)
        built = builder.build(
            config, own, params=params, model_config=model_config, progress=progress
        )
        self.config, self.model_config = built.config, built.model_config
        self._programs, self._core, self._built_seconds = built.programs, built.core, built.seconds
        self._samplers, self._runner = built.samplers, built.runner
        try:
            self._worker = Worker(built.core, built.runner.release)
            self._residency = Residency(
                self._worker, built.core, built.runner, self.config.weight_version
            )
            self._sources = WeightSources(self.config, self.model_config, built.runner.target)
            self._submitter = Submitter(
                self._worker,
                built,
                tokenizer=self.tokenizer,
                vocabulary=vocabulary,
                weight_versions=self._residency.versions,
            )
            # Calls under way hold it, too: the engine stops when nobody wants anything of it.
            self._finalizer = weakref.finalize(self._submitter, _stop, self._worker, built.programs)
            # Registered after jax's own hook, so it runs before: a thread inside jax at interpreter
            # exit would abort the process. `finalize` may have registered its own hook long ago.
            self._finalizer.atexit = False
            atexit.register(self._finalizer)
            # The engine answers once the smallest programs are there; the others follow.
            built.programs.wait_first()
        except BaseException:  # Ctrl-C, too
            built.programs.stop()
            self.shutdown()
            raise
        self._startup_seconds = time.perf_counter() - started

    # -- generation

    @spelled_out(GENERATE_PARAMETERS)
    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Any:
        """Continues one prompt or a list of them; blocks, or streams with `stream=True`.

        Ctrl-C, or closing the stream, aborts the requests at the end of the window under way.

        Args:
          prompt: A text, or a list of texts. As with the other arguments, any type is taken and
            checked: what is wrong is a `RequestError` that names it.
          sampling_params: A dict or `SamplingParams` for all prompts, or a list, one a prompt.
          input_ids: Token ids instead of text.
          return_logprob: Report the logprob of every generated token: `output_token_logprobs`, as
            SGLang after penalties, bias and temperature and before the filters;
            `output_token_raw_logprobs`, the model's own; `output_token_processed_logprobs`, of the
            distribution it was drawn from. Lists are made when they are read; their numbers as
            numpy are `output["meta_info"].arrays("output_token_logprobs")`.
          logprob_start_len: With it, also report the model's own logprobs of the prompt's tokens
            from this one on; -1 for none.
          top_logprobs_num: With it, the so many most likely tokens at every place, by SGLang's
            measure; `capture` gives those of any other.
          token_ids_logprob: With it, the logprobs of these ids at every place.
          return_text_in_logprobs: Give the tokens' text in these lists.
          return_hidden_states: Report the model's hidden states in `meta_info["hidden_states"]` of
            the final output: True, float32 [tokens, hidden] of every token of prompt and output,
            the last one included, whatever the prefix cache had (it is not used for the prompt);
            "last", [hidden] of the last token; "mean", [hidden], over all of them. One for all
            prompts, or a list. They are those after the final norm, unless `hidden_layers` of
            `EngineConfig` names others; then layers are an axis before the last.
          hidden_states_format: "sglang" gives its nested lists instead: the prompt's states as
            the first element, then one an output token, the last of which has none.
          return_prompt_token_ids: Give the prompt's ids in `prompt_token_ids`.
          input_embeds: Embeddings [tokens, hidden] instead of ids, numpy or jax; or a list. The
            prefix cache stays on; what such a prompt computes is found by its own samples only.
          sampler: What turns logits into tokens for this call: a `Sampler`, a transform, a draw, or
            any function `(logits, ctx) -> token`. See `jaxengine.sampling`.
          custom_logit_processor: A function `(logits, ctx) -> logits` or a transform, put where
            SGLang has it: after penalties and bias, before the temperature. SGLang's pickled
            strings are refused: a request is never unpickled.
          capture: Name -> `fn(logits, drawn, ctx) -> array [B, ...]`, traced into the loop; comes
            back in `captures`, a numpy array with a row a token.
          companions: Prompts that are continued in lockstep by the same tokens, for a sampler that
            combines their logits; a list, or one list a prompt.
          stream: Give an iterator of outputs as they grow: `text` and `output_ids` so far, and
            what is new in `delta_text` and `delta_ids`; for a list also `index`.
          progress: Show a bar with tokens per second, the time left and prefix-cache hits.
          rid: The request's id, in `meta_info["id"]`; fresh when None.
          priority: Who is more urgent, where `schedule_policy` is "priority"; an integer.
          cache_salt: Prefixes in the cache are shared only with requests of the same one; a string.
          extra_key: Another one; both count.
          timeout_s: Longest time from here to the end, waiting included; a request that takes
            longer ends with what there is, `finish_reason` "abort".
          on_error: "raise": the first request that fails raises, and its siblings are aborted.
            "return": one that fails, or is wrong, becomes an output beside the others: what there
            is of it, `finish_reason` {"type": "abort", "message": ..., "err_type": ...}, and
            `error`, {"type": the exception's class, "message": ...}, a key no other output has.
          **others: Further arguments of SGLang, refused by name where they are set.

        Returns:
          SGLang's dict for a single prompt, else a list of them, samples of a prompt together.

        Raises:
          RequestError: For a bad argument; nothing of the call has been queued then.
          QueueFullError: If more would wait than `max_queued_requests`; likewise.
          StepError, NaNLogitsError: If the device or the model failed this request.
          EngineDeadError: After `shutdown`.
        """
        call = self._call(prompt, sampling_params, input_ids, arguments)
        if arguments.get("stream"):
            return call
        if not arguments.get("progress"):
            return call.collect()
        with self._progress(call) as bar:
            return call.collect(bar.update)

    @spelled_out(GENERATE_PARAMETERS)
    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Any:
        """`generate` for coroutines, in any event loop; cancelling the task aborts its requests.

        With `stream=True` the awaited result is an async iterator, as in SGLang.
        """
        call = self._call(prompt, sampling_params, input_ids, arguments)
        if arguments.get("stream"):
            return call
        if not arguments.get("progress"):
            return await call.acollect()
        with self._progress(call) as bar:
            return await call.acollect(bar.update)

    def imap(
        self,
        items: Iterable[Any],
        sampling_params: Any = None,
        *,
        max_in_flight: int | None = None,
        ordered: bool = True,
        on_error: str = "raise",
        **arguments: Unpack[RequestArguments],
    ) -> Iterator[Any]:
        """Continues prompts as they come, lazily: a generator over any iterable, endless ones too.

        With the same seed, item i gives what prompt i of a list gives to `generate`. Closing the
        generator aborts what is in flight.

        Args:
          items: Each a text, a list of token ids, or a dict of arguments of `generate`; its own
            sampling parameters go before those of the call. Taken when there is room.
          sampling_params: For all items.
          max_in_flight: Most items that run or wait; twice `max_running_requests` when None.
          ordered: Results in the order of the items, as `generate` gives them for one; else
            `(place, result)` as they end.
          on_error: "raise", or "return" to give the exception of an item that fails in its place.
          **arguments: Further arguments of `generate`, for all items.

        Raises:
          RequestError: For an item that is wrong, with `on_error="raise"`; the exception of one
            that fails, likewise.
          EngineDeadError: After `shutdown`, always.
        """
        common = {"sampling_params": sampling_params, **arguments}
        flow = self._flow(max_in_flight, ordered, on_error)
        return imap(item_start(self._submitter.start, common), items, flow)

    def aimap(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        sampling_params: Any = None,
        *,
        max_in_flight: int | None = None,
        ordered: bool = True,
        on_error: str = "raise",
        **arguments: Unpack[RequestArguments],
    ) -> AsyncIterator[Any]:
        """`imap` for coroutines: an async generator; the items may come asynchronously, too."""
        common = {"sampling_params": sampling_params, **arguments}
        flow = self._flow(max_in_flight, ordered, on_error)
        return aimap(item_start(self._submitter.start, common), items, flow)

    # -- control

    def abort(self, rid: str | Callable[[str], bool]) -> None:
        """Ends requests at the end of the window under way.

        Their callers get what there is, with `finish_reason` "abort". Ids that are not in flight
        are ignored.

        Args:
          rid: The exact id, or a function that says of an id whether it is meant.
        """
        self._submitter.abort(rid if callable(rid) else lambda other: other == rid)

    def abort_all(self) -> None:
        """Ends every request in flight."""
        self._submitter.abort(lambda rid: True)

    def pause(self, mode: str = "in_place") -> None:
        """Waits for the window under way, and lets no other begin before `resume`.

        Requests that come meanwhile wait; their `timeout_s` runs on.

        Args:
          mode: "in_place": those that run keep their pages. "retract": they give them back, and
            are computed anew afterwards. "abort": they end.

        Raises:
          RequestError: For another mode.
          EngineDeadError: After `shutdown`.
        """
        if mode not in ("in_place", "retract", "abort"):
            raise RequestError(f"`mode` must be in_place, retract or abort, got {mode!r}.")
        if mode == "abort":
            self.abort_all()
        self._worker.pause(keeps_pages=mode == "in_place")

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._worker.call(self._core.resume).result()

    def flush_cache(self) -> CacheFlush:
        """Forgets all cached prefixes; requests that run go on with the pages they have."""
        self._worker.call(self._core.scheduler.flush_cache).result()
        return CacheFlush(success=True)

    # -- weights and memory

    @property
    def sampler(self) -> Sampler:
        """What turns logits into tokens where a call says nothing else."""
        return self._samplers.own.steps.sampler

    @property
    def params(self) -> Any:
        """The model's arrays on the device, as `jaxengine.models` names them.

        Do not donate them. None while they are released, and after `shutdown`.
        """
        return self._runner.params

    def update_weights(
        self,
        weights: Any,
        *,
        version: str | None = None,
        running: str = "finish",
        partial: bool = False,
    ) -> None:
        """Puts other weights in the place of these: all of them or, on any error, none.

        Names, shapes and dtypes are checked first; floats are cast to the engine's dtype. The
        prefix cache is flushed. Every output's `weight_version` says what its last token was drawn
        with; one that saw a change has `output_weight_versions`, a name a token.

        Args:
          weights: A tree like `params`, whose arrays are used as they are where dtype and placement
            agree: nothing is copied, so do not donate them later (pass copies if you do). Or a dict
            of Hugging Face names and numpy, jax or DLPack arrays; or a checkpoint folder or hub id.
          version: Name of these weights; a number counted up when None.
          running: "finish": requests under way end with the weights they have, and those that come
            meanwhile wait; while paused, at once. "keep": those under way go on with the new ones
            from the next step on, over the keys and values they have; `pause("retract")` before,
            and `resume` after, have these made anew.
          partial: A dict may lack names; what they name stays as it is.

        Raises:
          WeightsError: Names every missing, unexpected and misshapen tensor at once.
        """
        make = self._sources.read(weights, is_partial=partial)
        name = str(len(self._residency.versions)) if version is None else version
        self._residency.update(make, name, running)
        if isinstance(weights, str | os.PathLike):
            path = str(weights)
            self.config = dataclasses.replace(self.config, model_path=path, served_model_name=path)

    def weights_by_name(self, name: str) -> Any:
        """The array that a checkpoint calls `name`, e.g. "model.norm.weight"; None for no such."""
        return self._sources.named(name, self._runner.params)

    def release_memory(
        self, tags: Collection[str] | None = None, *, keep_copy: bool = True
    ) -> dict[str, Any]:
        """Frees device memory between uses; waits for requests under way, and lets others wait.

        What is freed is free for this process at once. JAX's allocator gives it to other processes
        only where JAX was started with XLA_PYTHON_CLIENT_ALLOCATOR=platform. Arrays that somebody
        else holds, such as a trainer's own, stay.

        Args:
          tags: "weights", "kv_cache" (with all state of running requests), or both; None is both.
          keep_copy: Keep the weights in host memory, for `resume_memory`; else they must come from
            `update_weights`.

        Returns:
          Bytes that went, by tag, and the allocator's `bytes_in_use_before` and `bytes_in_use`,
          None where the backend does not tell.
        """
        return self._residency.release(tags, keep_copy=keep_copy)

    def resume_memory(self, tags: Collection[str] | None = None) -> None:
        """Brings back what `release_memory` took; with all of it there, requests go on.

        Raises:
          WeightsError: For weights that were released without a copy.
        """
        self._residency.resume(tags, self._sources.place)

    # -- lifetime

    def shutdown(self) -> None:
        """Stops the threads and frees the device memory; a second call does nothing.

        Requests in flight fail with EngineDeadError. Memory is free for this process at once, and
        for others where JAX was started with XLA_PYTHON_CLIENT_PREALLOCATE=false.
        """
        if self._finalizer is not None:
            _stop(self._worker, self._programs)
            self._finalizer.detach()
            atexit.unregister(self._finalizer)

    def __repr__(self) -> str:
        config = self.config
        name = config.served_model_name or config.model_path or "of arrays in memory"
        state = "" if self.is_alive else ", shut down"
        return (
            f"<Engine {name}: {self.model_config.architecture}, {config.dtype}, "
            f"{config.context_length:,} tokens of context{state}>"
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def wait_until_compiled(self, *, background: bool = False) -> None:
        """Waits until the programs the engine began with are ready.

        Args:
          background: Also for those compiled ahead of need: steps without a sampler, and fused
            forms of samplers that calls brought. Nothing after is slowed by compiling then.
        """
        self._programs.wait(background=background)

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return not self._worker.is_dead

    def start_profile(self, output_dir: str | None = None, **others: Any) -> None:
        """Starts a trace of the process; its steps are named by bucket, "decode_b32_k8".

        Args:
          output_dir: Folder it will be written to; a fresh temporary one when None.
          **others: What SGLang's torch profiler takes is ignored, with a warning.

        Raises:
          RuntimeError: If one is under way in this process.
        """
        for name in others:
            logger.warning("`%s` of start_profile is ignored: JAX's profiler has no such.", name)
        self._profile = Profile(output_dir)

    def stop_profile(self) -> str:
        """Writes the trace, and gives the path of the file to open at ui.perfetto.dev.

        Raises:
          RuntimeError: If none is under way.
        """
        if self._profile is None:
            raise RuntimeError("No profile is under way; call `start_profile` first.")
        profile, self._profile = self._profile, None
        return str(profile.stop())

    def stats(self) -> dict[str, Any]:
        """Counts and times since the start.

        Queue (`num_waiting`, `num_running`), pages (`num_free_pages`, `num_cached_pages`,
        `cache_hit_rate`), tokens, each `_per_s` of the time the engine had work, windows by their
        number of steps (`window_sizes`), and where that time went (`seconds`): "schedule",
        "dispatch", "wait" for the device, and "text" in a thread of its own.
        """
        return {
            **self._core.stats(),
            "startup_seconds": {**self._built_seconds, "total": self._startup_seconds},
            "programs": self._programs.stats(),
            "max_total_tokens": self.config.max_total_tokens,
        }

    # -- prompts that are read, and conversations: functions of `generate`

    encode, async_encode = pooling.encode, pooling.async_encode
    score, async_score = pooling.score, pooling.async_score
    chat, async_chat = chats.chat, chats.async_chat

    # -- inside

    def _call(
        self, prompt: Any, sampling_params: Any, input_ids: Any, arguments: GenerateArguments
    ) -> Call:
        asked = {"prompt": prompt, "sampling_params": sampling_params, "input_ids": input_ids}
        return self._submitter.start({**asked, **arguments})

    def _progress(self, call: Call) -> Progress:
        return Progress(call.num_samples, self.stats, unit="sample", is_shown=True)

    def _flow(self, max_in_flight: int | None, ordered: bool, on_error: str) -> Flow:
        if max_in_flight is None:
            max_in_flight = 2 * (self.config.max_running_requests or 1)
        return Flow.of(max_in_flight, ordered=ordered, on_error=on_error)


def _stop(worker: Worker, programs: Any) -> None:
    worker.close()
    programs.stop()
    worker.stop(SHUTDOWN_TIMEOUT_S)
