"""Which requests are in flight, by the ids their callers know, and how many there may be."""

import threading
from collections.abc import Callable, Collection

from jaxengine.errors import QueueFullError, RequestError
from jaxengine.types import SequenceRequest


class InFlight:
    """The requests that have been claimed and not yet released. Safe from any thread."""

    def __init__(self, limit: int | None) -> None:
        """Starts with none.

        Args:
          limit: Most samples at once; None for no limit.
        """
        self._limit = limit
        self._by_rid: dict[str, dict[int, SequenceRequest]] = {}
        self._num_samples = 0
        # Reentrant: the garbage collector may drop a Call, which releases ids, inside it.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._num_samples

    def named(self, is_meant: Callable[[str], bool]) -> list[SequenceRequest]:
        """The requests whose id is meant."""
        with self._lock:
            # Copies: what the garbage collector drops meanwhile releases its ids.
            return [
                request
                for rid, named in list(self._by_rid.items())
                if is_meant(rid)
                for request in list(named.values())
            ]

    def claim(self, samples: Collection[SequenceRequest]) -> None:
        """Takes the ids and the room of samples, or of none of them.

        Raises:
          RequestError: For an id that is in flight.
          QueueFullError: If there would be more than the limit.
        """
        with self._lock:
            for sample in samples:
                if sample.rid in self._by_rid:
                    raise RequestError(
                        f"`rid` {sample.rid!r} is already in flight; choose another."
                    )
            if self._limit is not None and self._num_samples + len(samples) > self._limit:
                raise QueueFullError(
                    f"{len(samples):,} more samples do not fit: {self._num_samples:,} are in "
                    f"flight, and `max_queued_requests` lets {self._limit:,} be, those that run "
                    "included. Wait for some to end, send fewer at once, or raise it."
                )
            for sample in samples:
                self._by_rid.setdefault(sample.rid, {})[sample.seq_id] = sample
            self._num_samples += len(samples)

    def release(self, samples: Collection[SequenceRequest]) -> None:
        """Gives back what was claimed."""
        with self._lock:
            for sample in samples:
                named = self._by_rid[sample.rid]
                del named[sample.seq_id]
                if not named:
                    del self._by_rid[sample.rid]
            self._num_samples -= len(samples)
