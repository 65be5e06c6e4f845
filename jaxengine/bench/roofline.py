"""How many bytes and FLOPs a workload has to move, from shapes alone, and how near a run came."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxengine.config import ModelConfig

GPU_PEAKS = {"H200": (4.3e12, 790e12)}
"""Part of a GPU's name -> bytes/s and bfloat16 FLOP/s, measured rather than promised."""


class Peaks(NamedTuple):
    """What the device can do; None where nobody measured it.

    Attributes:
      bytes_per_s: Reading memory.
      flops_per_s: A large bfloat16 matrix product.
    """

    bytes_per_s: float | None
    flops_per_s: float | None


UNKNOWN_PEAKS = Peaks(None, None)


class Lengths(NamedTuple):
    """A request: prompt tokens, and tokens to generate."""

    prompt: int
    output: int


class Work(NamedTuple):
    """Bytes read and written, and floating-point operations."""

    num_bytes: float
    num_flops: float

    def floor_s(self, peaks: Peaks) -> float:
        """Seconds at the device's peak, reading and computing at the same time."""
        return max(
            self.num_bytes / (peaks.bytes_per_s or float("inf")),
            self.num_flops / (peaks.flops_per_s or float("inf")),
        )


def peaks_of(device_kind: str) -> Peaks:
    """Measured peaks of a device, by its name."""
    known = [peaks for name, peaks in GPU_PEAKS.items() if name in device_kind]
    return Peaks(*known[0]) if known else UNKNOWN_PEAKS


class Roofline:
    """The work of a batch of requests on one model."""

    def __init__(self, model: ModelConfig, dtype: str, requests: Sequence[Lengths]) -> None:
        heads = model.num_heads * model.head_dim
        kv_heads = model.num_kv_heads * model.head_dim
        per_layer = 2 * heads + 2 * kv_heads + 3 * model.intermediate_size
        self._layers = model.num_layers * model.hidden_size * per_layer
        self._vocab = model.vocab_size * model.hidden_size
        self._kv_bytes = model.kv_bytes_per_token[dtype]
        # Scores and weighted values: two products of 2 FLOPs over every head.
        self._attention = 4 * heads * model.num_layers
        self._requests = requests
        self.weight_bytes = (self._layers + self._vocab) * (4 if dtype == "float32" else 2)

    def min_steps(self, num_slots: int) -> int:
        """Fewest decode steps: the longest output, or all outputs through the slots."""
        after_first = [r.output - 1 for r in self._requests]
        return max(max(after_first), -(-sum(after_first) // num_slots))

    def decode(self, num_steps: int | float) -> Work:
        """All tokens but the first of each request; the weights are read once a step."""
        tokens = sum(r.output - 1 for r in self._requests)
        # Step j of a request reads its prompt and the j tokens generated so far.
        read = sum(
            (r.output - 1) * r.prompt + r.output * (r.output - 1) // 2 for r in self._requests
        )
        return Work(
            num_steps * self.weight_bytes + (read + tokens) * self._kv_bytes,
            2 * (self._layers + self._vocab) * tokens + self._attention * read,
        )

    def prefill(self, num_calls: int | float) -> Work:
        """All prompts and their first tokens; keys and values are written and read once."""
        tokens = sum(r.prompt for r in self._requests)
        pairs = sum(r.prompt * (r.prompt + 1) // 2 for r in self._requests)
        return Work(
            num_calls * self.weight_bytes + 2 * tokens * self._kv_bytes,
            2 * self._layers * tokens
            + 2 * self._vocab * len(self._requests)
            + self._attention * pairs,
        )


def compare(parts: Sequence[Work], floors: Sequence[Work], seconds: float, peaks: Peaks) -> dict:
    """The roofline entries of a result.

    Args:
      parts: Work of the phases as they were scheduled.
      floors: The same with the fewest possible passes over the weights.
      seconds: What they took.
      peaks: Shares are None where the peak is unknown.
    """
    num_bytes, num_flops = sum(w.num_bytes for w in parts), sum(w.num_flops for w in parts)
    floor_s = sum(work.floor_s(peaks) for work in floors) if peaks.bytes_per_s else None
    return {
        "bytes": num_bytes,
        "flops": num_flops,
        "bytes_per_s": num_bytes / seconds,
        "flops_per_s": num_flops / seconds,
        "peak_bytes_per_s": peaks.bytes_per_s,
        "peak_flops_per_s": peaks.flops_per_s,
        "share_of_peak_bytes": _share(num_bytes / seconds, peaks.bytes_per_s),
        "share_of_peak_flops": _share(num_flops / seconds, peaks.flops_per_s),
        "floor_s": floor_s,
        "share_of_floor": _share(floor_s, seconds),
    }


def _share(part: float | None, whole: float | None) -> Any:
    return None if part is None or whole is None else part / whole
