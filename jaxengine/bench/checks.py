"""What must hold of a workload's outputs, and how they agree with the plain path."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxengine.bench.calls import Call
from jaxengine.bench.plain import Judged, PlainModel

type Output = Mapping[str, Any]

TOLERANCES = {"float32": 2e-3, "bfloat16": 0.06, "float16": 0.02}
"""Nats by which a log-probability of the engine may differ from the plain path's, by dtype."""

ROUNDING_FACTOR = 1.5
"""How much further from float32 than plain rounding an engine may be. In six layers of 0.5B's width
two plain ways to round differ by 8 % in the largest of 6,300 errors, by 1 % in the root of the mean
square; gate and up products that are 1 % too large make it 1.8 times as large.
"""

RMS_SHARE = 0.05
"""Root of the mean square that is allowed in any case, as a share of the tolerance."""

MAX_JUDGED = 4
"""Requests of a workload that are compared with the plain path."""

NUM_LISTED = 20
"""Most likely tokens compared at every place of a greedy request."""


def check_outputs(call: Call, outputs: Sequence[Output], vocab_size: int) -> dict[str, bool]:
    """Checks of a call's outputs, by name; all must be True."""
    ids = [output["output_ids"] for output in outputs]
    metas = [output["meta_info"] for output in outputs]
    wanted = [params["max_new_tokens"] for params in call.sampling_params]
    checks = {
        "lengths": [len(row) for row in ids] == wanted
        and all(meta["finish_reason"]["type"] == "length" for meta in metas),
        "ids_in_vocabulary": all(0 <= i < vocab_size for row in ids for i in row),
        "nothing_cached": not any(meta["cached_tokens"] for meta in metas),
    }
    if call.arguments.get("return_logprob"):
        rows = [[entry[0] for entry in meta["output_token_logprobs"]] for meta in metas]
        checks["logprobs"] = [len(row) for row in rows] == wanted and all(
            math.isfinite(x) and x < 1e-3 for row in rows for x in row
        )
    if call.arguments.get("top_logprobs_num"):
        count = call.arguments["top_logprobs_num"]
        lists = [entries for meta in metas for entries in meta["output_top_logprobs"]]
        checks["top_logprobs"] = all(len(entries) == count for entries in lists)
    if call.arguments.get("return_hidden_states"):
        lens = [len(prompt) + len(row) for prompt, row in zip(call.input_ids, ids, strict=True)]
        states = [np.asarray(meta["hidden_states"]) for meta in metas]
        checks["hidden_states"] = [len(s) for s in states] == lens and all(
            np.isfinite(s).all() and s.any(axis=-1).all() for s in states
        )
    return checks


class Comparison(NamedTuple):
    """How a call agrees with the plain path.

    Attributes:
      checks: By name; all must be True.
      numbers: What they are made of.
    """

    checks: dict[str, bool]
    numbers: dict[str, float]


class Errors(NamedTuple):
    """Differences of log-probabilities, in nats.

    Attributes:
      largest: Of their absolute values.
      rms: Root of the mean square.
    """

    largest: float
    rms: float

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> "Errors":
        """Of all parts together."""
        every = np.concatenate(parts)
        return cls(float(np.abs(every).max()), float(np.sqrt(np.square(every).mean())))


def allowed_errors(plain: Errors, tolerance: float) -> Errors:
    """What an engine may be off where the plain path in its dtype is off by `plain`.

    A large model rounds more often, and its logits are larger; what that costs is measured.
    """
    return Errors(
        max(tolerance, ROUNDING_FACTOR * plain.largest),
        max(tolerance * RMS_SHARE, ROUNDING_FACTOR * plain.rms),
    )


def judged_call(call: Call, num_rows: int) -> Call:
    """The call whose outputs can be compared: as many rows as run at once, with logprobs."""
    is_greedy = call.sampling_params[0].get("temperature") == 0
    arguments = {**call.arguments, "return_logprob": True}
    arguments["top_logprobs_num"] = NUM_LISTED if is_greedy else 0
    return call.first(num_rows)._replace(arguments=arguments)


def compare(
    call: Call,
    outputs: Sequence[Output],
    plain: PlainModel,
    rounded: PlainModel,
    tolerance: float,
) -> Comparison:
    """Compares some requests of a `judged_call`, spread over it, with the plain path.

    Args:
      call: What was asked.
      outputs: What came.
      plain: In float32.
      rounded: The plain path in the engine's dtype.
      tolerance: In nats; more is allowed where `rounded` needs it, see `allowed_errors`.
    """
    chosen = np.linspace(0, len(outputs) - 1, min(MAX_JUDGED, len(outputs))).astype(int)
    errors: list[np.ndarray] = []
    rounding: list[np.ndarray] = []
    places: list[tuple[Judged, np.ndarray, Mapping[str, Any]]] = []
    for index in chosen:
        output, params = outputs[index], call.sampling_params[index]
        ids, meta = output["output_ids"], output["meta_info"]
        tops = meta.get("output_top_logprobs") or [[]] * len(ids)
        listed = np.asarray([[entry[1] for entry in top] for top in tops], np.int32)
        values = np.asarray([[entry[0] for entry in top] for top in tops])
        text = (call.input_ids[index], ids, listed)
        judged = plain.judge(*text)
        reported = np.column_stack([meta["output_token_raw_logprobs"], values])
        errors.append((reported - judged.logprobs).ravel())
        rounding.append((rounded.judge(*text).logprobs - judged.logprobs).ravel())
        places.append((judged, np.asarray(ids), params))
    found, plain_error = Errors.of(errors), Errors.of(rounding)
    allowed = allowed_errors(plain_error, tolerance)
    decided = [
        (judged.best == ids)[judged.margin > allowed.largest]
        for judged, ids, params in places
        if params.get("temperature") == 0
    ]
    checks = {
        "logprobs_as_plain": found.largest <= allowed.largest and found.rms <= allowed.rms,
        "decided_tokens_as_plain": all(equal.all() for equal in decided),
        "tokens_pass_filters": all(
            _is_allowed(judged, params, tolerance)
            for judged, _, params in places
            if params.get("temperature") != 0
        ),
    }
    numbers = {
        "max_logprob_error": found.largest,
        "rms_logprob_error": found.rms,
        "plain_max_logprob_error": plain_error.largest,
        "plain_rms_logprob_error": plain_error.rms,
        "tolerance": allowed.largest,
        "rms_tolerance": allowed.rms,
        "num_places": sum(len(ids) for _, ids, _ in places),
        "num_decided": sum(map(len, decided)),
    }
    return Comparison(checks, numbers)


def _is_allowed(judged: Judged, params: Mapping[str, Any], tolerance: float) -> bool:
    """Whether the filters could have left these tokens; `rank` and `mass` forgive the tolerance."""
    if params.get("temperature") != 1.0 or "frequency_penalty" in params:
        return True
    lowest = judged.peak + math.log(params["min_p"]) if params.get("min_p") else -math.inf
    return bool(
        (judged.rank < params.get("top_k", math.inf)).all()
        and (judged.mass < params.get("top_p", 1.0) + 1e-6).all()
        and (judged.logprob + 2 * tolerance >= lowest).all()
    )
