"""Engine: the public API. Text in and out, in one process, from any thread or event loop."""

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxengine import build as builder
from jaxengine.call import Call
from jaxengine.chat import render
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.defaults import default_params, with_defaults
from jaxengine.errors import RequestError
from jaxengine.locate import locate
from jaxengine.log import logger
from jaxengine.pooling import (
    ONE_STEP,
    ScoreResult,
    check_encode,
    read_embeddings,
    read_scores,
    score_prompts,
)
from jaxengine.requests import group_size, parse_call
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.sampling import as_sampler, default_sampler
from jaxengine.sampling.processor import with_processor
from jaxengine.submit import Submitter
from jaxengine.text.detokenizer import Vocabulary
from jaxengine.text.tokenizer import eos_token_ids, load_tokenizer, set_chat_template
from jaxengine.types import SequenceRequest
from jaxengine.worker import Worker

SHUTDOWN_TIMEOUT_S = 60.0
"""Longest wait for a device step that is under way."""


class CacheFlush(NamedTuple):
    """What `Engine.flush_cache` gives, as in SGLang.

    Attributes:
      success: Always True: here the cache can be flushed at any time.
    """

    success: bool


class Engine:
    """An offline LLM engine with the interface of `sglang.Engine`.

    One process: no children, no ports, no signal handlers, no event-loop policy. Calls are safe
    from any thread and any event loop, notebook cells included; several engines may live side by
    side.

    >>> with Engine(model_path=jaxengine.DEMO_MODEL) as engine:
    ...     engine.generate("ROMEO:", {"temperature": 0, "max_new_tokens": 8})["text"]
    """

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
          **settings: Fields of `EngineConfig`, and other names of SGLang: see `jaxengine.compat`.

        Raises:
          TypeError: For a setting nobody knows.
          ConfigError: For a setting or checkpoint that does not fit.
          WeightsError: For tensors that do not fit the config.
          CapacityError: If the device has no room.
        """
        started = time.perf_counter()
        self._finalizer: weakref.finalize | None = None
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
            self._default_params = default_params(
                config,
                self._samplers.own.steps.sampler.params,
                vocab_size=self.model_config.vocab_size,
                tokenizer=self.tokenizer,
            )
            self._worker = Worker(built.core, built.runner.release)
            self._submitter = Submitter(
                self._worker,
                tokenizer=self.tokenizer,
                vocabulary=vocabulary,
                eos_token_ids=eos_token_ids(self.tokenizer, self.model_config.eos_token_ids),
                config=built.config,
            )
            # Calls under way hold it, too: the engine stops when nobody wants anything of it.
            self._finalizer = weakref.finalize(self._submitter, _stop, self._worker, built.programs)
            # Registered after jax's own hook, so it runs before: a thread inside jax at interpreter
            # exit would abort the process. `finalize` may have registered its own hook long ago.
            self._finalizer.atexit = False
            atexit.register(self._finalizer)
            # The engine answers once the smallest programs are there; the others follow.
            built.programs.wait(all_of_them=False)
        except BaseException:  # Ctrl-C, too
            built.programs.stop()
            self.shutdown()
            raise
        self._startup_seconds = time.perf_counter() - started

    # -- generation

    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        *,
        return_logprob: Any = False,
        logprob_start_len: Any = None,
        top_logprobs_num: Any = None,
        token_ids_logprob: Any = None,
        return_text_in_logprobs: bool = False,
        return_hidden_states: Any = False,
        hidden_states_format: str = "numpy",
        return_prompt_token_ids: bool = False,
        input_embeds: Any = None,
        sampler: Any = None,
        custom_logit_processor: Any = None,
        capture: Any = None,
        companions: Any = None,
        stream: bool = False,
        rid: Any = None,
        priority: Any = None,
        cache_salt: Any = None,
        extra_key: Any = None,
        timeout_s: Any = None,
        on_error: str = "raise",
        **others: Any,
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
            distribution it was drawn from.
          logprob_start_len: With it, also report the model's own logprobs of the prompt's tokens
            from this one on; -1 for none.
          top_logprobs_num: With it, the so many most likely tokens at every place.
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
        call = self._start(
            prompt,
            sampling_params,
            input_ids,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            token_ids_logprob=token_ids_logprob,
            return_text_in_logprobs=return_text_in_logprobs,
            return_hidden_states=return_hidden_states,
            hidden_states_format=hidden_states_format,
            return_prompt_token_ids=return_prompt_token_ids,
            input_embeds=input_embeds,
            sampler=sampler,
            custom_logit_processor=custom_logit_processor,
            capture=capture,
            companions=companions,
            stream=stream,
            rid=rid,
            priority=priority,
            cache_salt=cache_salt,
            extra_key=extra_key,
            timeout_s=timeout_s,
            on_error=on_error,
            others=others,
        )
        return call if stream else call.collect()

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        *,
        return_logprob: Any = False,
        logprob_start_len: Any = None,
        top_logprobs_num: Any = None,
        token_ids_logprob: Any = None,
        return_text_in_logprobs: bool = False,
        return_hidden_states: Any = False,
        hidden_states_format: str = "numpy",
        return_prompt_token_ids: bool = False,
        input_embeds: Any = None,
        sampler: Any = None,
        custom_logit_processor: Any = None,
        capture: Any = None,
        companions: Any = None,
        stream: bool = False,
        rid: Any = None,
        priority: Any = None,
        cache_salt: Any = None,
        extra_key: Any = None,
        timeout_s: Any = None,
        on_error: str = "raise",
        **others: Any,
    ) -> Any:
        """`generate` for coroutines, in any event loop; cancelling the task aborts its requests.

        With `stream=True` the awaited result is an async iterator, as in SGLang.
        """
        call = self._start(
            prompt,
            sampling_params,
            input_ids,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            token_ids_logprob=token_ids_logprob,
            return_text_in_logprobs=return_text_in_logprobs,
            return_hidden_states=return_hidden_states,
            hidden_states_format=hidden_states_format,
            return_prompt_token_ids=return_prompt_token_ids,
            input_embeds=input_embeds,
            sampler=sampler,
            custom_logit_processor=custom_logit_processor,
            capture=capture,
            companions=companions,
            stream=stream,
            rid=rid,
            priority=priority,
            cache_salt=cache_salt,
            extra_key=extra_key,
            timeout_s=timeout_s,
            on_error=on_error,
            others=others,
        )
        return call if stream else await call.acollect()

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

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """`abort` or `abort_all`, as SGLang calls them; the id must be exact."""
        if abort_all:
            self.abort_all()
        else:
            self.abort(rid)

    def pause(self, mode: Literal["in_place", "retract", "abort"] = "in_place") -> None:
        """Waits for the window under way, and lets no other begin before `resume`.

        Requests that come meanwhile wait; their `timeout_s` runs on.

        Args:
          mode: "in_place": those that run keep their pages. "retract": they give them back, and
            are computed anew afterwards. "abort": they end.

        Raises:
          ValueError: For another mode.
          EngineDeadError: After `shutdown`.
        """
        if mode not in ("in_place", "retract", "abort"):
            raise ValueError(f"`mode` must be in_place, retract or abort, got {mode!r}.")
        if mode == "abort":
            self.abort_all()
        self._worker.pause(keeps_pages=mode == "in_place")

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._worker.call(self._core.resume).result()

    pause_generation = pause
    continue_generation = resume

    def flush_cache(self) -> CacheFlush:
        """Forgets all cached prefixes; requests that run go on with the pages they have."""
        self._worker.call(self._core.scheduler.flush_cache).result()
        return CacheFlush(success=True)

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

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def wait_until_compiled(self) -> None:
        """Waits until every program is ready, so that nothing after is slowed by compiling."""
        self._programs.wait(all_of_them=True)

    def stats(self) -> dict[str, Any]:
        """Counts and times since the start: queue, pages, tokens, windows, start-up."""
        return {
            **self._core.stats(),
            "startup_seconds": {**self._built_seconds, "total": self._startup_seconds},
            "programs": self._programs.stats(),
            "max_total_tokens": self.config.max_total_tokens,
        }

    # -- prompts that are read, and conversations

    def encode(
        self,
        prompt: Any = None,
        input_ids: Any = None,
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        **others: Any,
    ) -> Any:
        """Gives embeddings of prompts, by the same model that generates.

        Args:
          prompt: A text, or a list of texts.
          input_ids: Token ids instead.
          pooling: "last", the hidden state of the last token, or "mean", over all tokens. For the
            first, beginnings that prompts share are computed once.
          normalize: Scales the embedding to length 1.
          dimensions: Keeps so many of its first entries, before that.
          **others: Of `generate`, such as `rid`.

        Returns:
          `{"embedding": float32 [hidden], "meta_info": {...}}` (SGLang: a list of floats), or a
          list of these.

        Raises:
          RequestError: For a bad argument.
        """
        check_encode(pooling, dimensions, self.model_config.hidden_size)
        asked = {"return_hidden_states": pooling, "sampler": default_sampler(), **others}
        outputs = self.generate(prompt, ONE_STEP, input_ids, **asked)
        return read_embeddings(outputs, normalize=normalize, dimensions=dimensions)

    async def async_encode(
        self,
        prompt: Any = None,
        input_ids: Any = None,
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        **others: Any,
    ) -> Any:
        """`encode` for coroutines."""
        check_encode(pooling, dimensions, self.model_config.hidden_size)
        asked = {"return_hidden_states": pooling, "sampler": default_sampler(), **others}
        outputs = await self.async_generate(prompt, ONE_STEP, input_ids, **asked)
        return read_embeddings(outputs, normalize=normalize, dimensions=dimensions)

    def score(
        self,
        query: Any = None,
        items: Any = None,
        label_token_ids: Any = None,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> ScoreResult:
        """Gives each item's probabilities of some tokens to come next.

        The query is computed once, where it comes first: the prefix cache has it for all items.

        Args:
          query: A text, or token ids.
          items: A text or a list of texts, or a list of lists of ids; each joins the query, as one
            text.
          label_token_ids: The tokens to score; at most 64.
          apply_softmax: Probabilities among these tokens, which sum to 1, instead of among all.
          item_first: The item stands before the query.

        Returns:
          A list of one list of probabilities an item, also its `scores`, with `prompt_tokens`.

        Raises:
          RequestError: For a mix of texts and ids, or a label outside the vocabulary.
        """
        asked = score_prompts(query, items, label_token_ids, item_first)
        outputs = self.generate(
            sampling_params=ONE_STEP, return_logprob=True, sampler=default_sampler(), **asked
        )
        return read_scores(outputs, apply_softmax=apply_softmax)

    async def async_score(
        self,
        query: Any = None,
        items: Any = None,
        label_token_ids: Any = None,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> ScoreResult:
        """`score` for coroutines."""
        asked = score_prompts(query, items, label_token_ids, item_first)
        outputs = await self.async_generate(
            sampling_params=ONE_STEP, return_logprob=True, sampler=default_sampler(), **asked
        )
        return read_scores(outputs, apply_softmax=apply_softmax)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        tools: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """Continues a conversation, or a list of them, by the tokenizer's chat template.

        Args:
          messages: `[{"role": "user", "content": ...}, ...]`, or a list of such lists.
          sampling_params: As for `generate`.
          tools: JSON schemas, or functions with docstrings, for templates that show them.
          chat_template: A Jinja template, or the name of one the tokenizer has, instead of its own.
          add_generation_prompt: End with the beginning of an answer.
          continue_final_message: Go on with the last message instead of answering it.
          template_kwargs: Further variables of the template, such as `enable_thinking`.
          **others: Of `generate`, such as `stream`.

        Returns:
          What `generate` gives.

        Raises:
          RequestError: Where there is no tokenizer or template, or it refuses the messages.
        """
        ids = render(
            self.tokenizer,
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.generate(None, sampling_params, ids, **others)

    async def async_chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        tools: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """`chat` for coroutines."""
        ids = render(
            self.tokenizer,
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return await self.async_generate(None, sampling_params, ids, **others)

    # -- inside

    def _start(
        self,
        prompt: Any,
        sampling_params: Any,
        input_ids: Any,
        *,
        sampler: Any,
        custom_logit_processor: Any,
        capture: Any,
        companions: Any,
        return_text_in_logprobs: bool,
        stream: bool,
        **arguments: Any,
    ) -> Call:
        size = group_size(prompt, input_ids, companions) if companions else 1
        live = self._live_sampler(sampler, custom_logit_processor, capture, size)
        parsed = parse_call(
            prompt,
            with_defaults(sampling_params, self._default_params, live.steps.sampler.params),
            input_ids,
            companions=companions,
            specs=live.steps.sampler.params,
            vocab_size=self.model_config.vocab_size,
            hidden_size=self.model_config.hidden_size,
            max_top_logprobs=self.config.max_top_logprobs,
            tokenizer=self.tokenizer,
            **arguments,
        )
        samples = self._submitter.sequences(parsed, live, is_streaming=stream)
        # Compiled here, not in the engine's thread: nobody else waits for it.
        queued = [sample for sample in samples if isinstance(sample, SequenceRequest)]
        self._runner.prepare(
            live,
            scores=any(sample.logprob_start is not None for sample in queued),
            hidden=any(sample.feeds_last for sample in queued),
            embeds=any(sample.embeds is not None for sample in queued),
        )
        return self._submitter.submit(
            parsed, samples, is_streaming=stream, has_text=bool(return_text_in_logprobs)
        )

    def _live_sampler(
        self, sampler: Any, processor: Any, capture: Any, group_size: int
    ) -> LiveSampler:
        """The call's sampler bound to this engine; the engine's own when it brings none."""
        if sampler is None and processor is None and not capture and group_size == 1:
            return self._samplers.own
        chosen = self._samplers.own.steps.sampler if sampler is None else as_sampler(sampler)
        if processor is not None:
            chosen = with_processor(chosen, processor)
        if capture:
            if not isinstance(capture, Mapping) or not all(map(callable, capture.values())):
                raise RequestError("`capture` must map names to functions (logits, drawn, ctx).")
            chosen = chosen._replace(capture={**chosen.capture, **capture})
        return self._samplers.get(chosen, group_size, forget=self._programs.drop)


def _stop(worker: Worker, programs: Any) -> None:
    worker.close()
    programs.stop()
    worker.stop(SHUTDOWN_TIMEOUT_S)
