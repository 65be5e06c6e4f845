"""From the arguments of `generate` to a call under way: checked, given a sampler, and queued."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxengine.build import Built
from jaxengine.call import Call
from jaxengine.channel import Channel
from jaxengine.config import EngineConfig
from jaxengine.defaults import default_params, with_defaults
from jaxengine.errors import RequestError
from jaxengine.hidden import HiddenCollector
from jaxengine.in_flight import InFlight
from jaxengine.outputs import SequenceOutput
from jaxengine.params import HostParams, ParamsParser
from jaxengine.requests import ParsedCall, PromptRequest, Refused, group_size, parse_call
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.sampling import as_sampler
from jaxengine.sampling.processor import with_processor
from jaxengine.sequence_factory import SequenceFactory
from jaxengine.text.detokenizer import Detokenizer, Vocabulary
from jaxengine.text.tokenizer import eos_token_ids
from jaxengine.types import SequenceRequest, SequenceUpdate, StopReason
from jaxengine.worker import Output, Worker


class Submitter:
    """Starts calls, and hands their samples to the worker.

    A call under way holds it, so what stops the worker is tied to its life, not to the Engine's.
    """

    def __init__(
        self,
        worker: Worker,
        built: Built,
        *,
        tokenizer: Any,
        vocabulary: Vocabulary | None,
        weight_versions: Sequence[str],
    ) -> None:
        """Starts with nothing in flight.

        Args:
          worker: Takes what is submitted.
          built: What it works for.
          tokenizer: None where ids come in and go out.
          vocabulary: Its tokens' bytes.
          weight_versions: Names of all weights there have been; grows.

        Raises:
          ConfigError: For a bad value among the engine's own sampling parameters.
        """
        self._worker = worker
        self._runner, self._samplers, self._programs = built.runner, built.samplers, built.programs
        self._config, self._model_config = built.config, built.model_config
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._parsers: weakref.WeakKeyDictionary[LiveSampler, ParamsParser]
        self._parsers = weakref.WeakKeyDictionary()
        self._default_params = default_params(built.config, self._parser(built.samplers.own))
        self._weight_versions = weight_versions
        self._factory = SequenceFactory(
            built.config,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids(tokenizer, built.model_config.eos_token_ids),
        )
        self.in_flight = InFlight(_most_in_flight(built.config))

    def start(self, arguments: Mapping[str, Any], seed_key: int | str | None = None) -> Call:
        """Checks a call, and queues all of it or nothing.

        Args:
          arguments: Of `generate`, by name.
          seed_key: Of the one prompt, where it is one of a stream.

        Raises:
          TypeError: For an argument or sampling parameter nobody knows, with the nearest name.
          RequestError: For anything else that is wrong, or an id that is in flight.
          QueueFullError: If more would wait than may.
          EngineDeadError: After the worker was stopped.
        """
        live = self._sampler(arguments)
        parser = self._parser(live)
        given = arguments.get("sampling_params")
        params = with_defaults(given, self._default_params, parser.specs)
        parsed = parse_call(
            {**arguments, "sampling_params": params},
            seed_key=seed_key,
            parser=parser,
            hidden_size=self._model_config.hidden_size,
            max_top_logprobs=self._config.max_top_logprobs,
        )
        samples = self._factory.sequences(parsed, live)
        # Compiled here, not in the engine's thread: nobody else waits for it.
        queued = [sample for sample in samples if isinstance(sample, SequenceRequest)]
        self._runner.prepare(
            live,
            lists=any(sample.wants_lists for sample in queued),
            scores=any(sample.logprob_start is not None for sample in queued),
            hidden=any(sample.feeds_last for sample in queued),
            embeds=any(sample.embeds is not None for sample in queued),
        )
        return self._submit(parsed, samples)

    def abort(self, is_meant: Callable[[str], bool]) -> None:
        """Ends the requests in flight whose id is meant."""
        self._abort(self.in_flight.named(is_meant))

    def _sampler(self, arguments: Mapping[str, Any]) -> LiveSampler:
        """The call's sampler bound to this engine; the engine's own when it brings none."""
        names = ("sampler", "custom_logit_processor", "capture")
        sampler, processor, capture = (arguments.get(name) for name in names)
        size = group_size(arguments)
        if sampler is None and processor is None and not capture and size == 1:
            return self._samplers.own
        chosen = self._samplers.own.steps.sampler if sampler is None else as_sampler(sampler)
        if processor is not None:
            chosen = with_processor(chosen, processor)
        if capture:
            if not isinstance(capture, Mapping) or not all(map(callable, capture.values())):
                raise RequestError("`capture` must map names to functions (logits, drawn, ctx).")
            chosen = chosen._replace(capture={**chosen.capture, **capture})
        return self._samplers.get(chosen, size, forget=self._programs.drop)

    def _parser(self, live: LiveSampler) -> ParamsParser:
        parser = self._parsers.get(live)
        if parser is None:
            parser = ParamsParser(
                live.steps.sampler.params,
                vocab_size=self._model_config.vocab_size,
                tokenizer=self._tokenizer,
            )
            self._parsers[live] = parser
        return parser

    def _submit(self, parsed: ParsedCall, samples: list[SequenceRequest | Refused]) -> Call:
        channel = Channel()
        queued: dict[int, SequenceRequest] = {}
        outputs: list[tuple[SequenceRequest, Output]] = []
        for index, sample in enumerate(samples):
            if isinstance(sample, Refused):
                self._tell(parsed, channel, index, sample)
            else:
                queued[index] = sample
                outputs.append((sample, self._output(parsed, channel, index, sample)))
        self.in_flight.claim(queued.values())
        # Made before anything is queued: from here on whatever goes wrong, Ctrl-C too, aborts it.
        call = Call(
            channel,
            queued,
            num_outputs=len(samples),
            is_single=parsed.is_single,
            abort=self._abort,
            release=self._release,
        )
        try:
            self._worker.submit(outputs)
        except BaseException:
            call.close()
            raise
        return call

    def _tell(self, parsed: ParsedCall, channel: Channel, index: int, refused: Refused) -> None:
        """Makes the output of a sample that is not queued."""
        nothing = self._factory.nothing(refused.rid, is_streaming=parsed.is_streaming)
        output = self._output(parsed, channel, index, nothing)
        output.push(SequenceUpdate(nothing.seq_id, [], error=refused.error))

    def _output(
        self, parsed: ParsedCall, channel: Channel, index: int, sample: SequenceRequest
    ) -> SequenceOutput:
        request = parsed.requests[index // parsed.n]
        is_known = isinstance(request, PromptRequest)
        params = request.params if is_known else HostParams()
        decode = self._decode if parsed.has_text and self._tokenizer is not None else None
        return SequenceOutput(
            sample,
            channel,
            index=index,
            detokenizer=self._detokenizer(params),
            has_stop_strings=bool(params.stop or params.stop_regex),
            decode=decode,
            weight_versions=self._weight_versions,
            returns_errors=parsed.returns_errors,
            hidden=_collector(request, sample) if is_known else None,
            stream_interval=params.stream_interval or self._config.stream_interval,
            is_incremental=self._config.incremental_streaming_output,
            has_prompt_ids=is_known and request.has_prompt_ids,
        )

    def _decode(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def _detokenizer(self, params: HostParams) -> Detokenizer | None:
        if self._vocabulary is None:
            return None
        return Detokenizer(
            self._vocabulary,
            stop=params.stop,
            stop_regex=params.stop_regex,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            no_stop_trim=params.no_stop_trim,
        )

    def _release(self, samples: list[SequenceRequest]) -> None:
        self.in_flight.release(samples)

    def _abort(self, requests: list[SequenceRequest]) -> None:
        for request in requests:
            self._worker.finish(SequenceUpdate(request.seq_id, [], finish=StopReason("abort")))


def _most_in_flight(config: EngineConfig) -> int | None:
    if config.max_queued_requests is None:
        return None
    assert config.max_running_requests is not None
    return config.max_running_requests + config.max_queued_requests


def _collector(request: PromptRequest, sample: SequenceRequest) -> HiddenCollector | None:
    if request.hidden_states is None:
        return None
    return HiddenCollector(
        request.hidden_states,
        request.hidden_format,
        len(sample.prompt_ids),
        sample.max_new_tokens,
        may_be_cut=bool(request.params.stop or request.params.stop_regex),
    )
