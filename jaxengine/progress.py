"""A progress bar over requests, for terminals and notebooks. Knows outputs, not engines."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm

REFRESH_S = 0.25


class Progress:
    """Counts what ended; shows tokens per second, sequences running and prefix-cache hits."""

    def __init__(
        self,
        total: int | None,
        stats: Callable[[], Mapping[str, Any]],
        *,
        unit: str,
        is_shown: bool,
    ) -> None:
        """Shows the bar.

        Args:
          total: How many there are; None where nobody knows, and no time left is told.
          stats: `Engine.stats`.
          unit: What is counted.
          is_shown: Without it nothing is shown.
        """
        self._stats = stats
        self._started = self._shown = time.perf_counter()
        self._num_tokens = 0
        self._before = self._cache_counts() if is_shown else (0, 0)
        self._bar = tqdm(
            total=total, unit=unit, disable=not is_shown, dynamic_ncols=True, smoothing=0.1
        )

    def update(self, result: Any) -> None:
        """Counts a result: an output, a list of samples, or an exception."""
        if self._bar.disable:
            return
        for output in result if isinstance(result, list) else [result]:
            if isinstance(output, Mapping):
                self._num_tokens += output["meta_info"]["completion_tokens"]
        now = time.perf_counter()
        if now - self._shown >= REFRESH_S:
            self._shown = now
            self._bar.set_postfix_str(self._postfix(now), refresh=False)
        self._bar.update()

    def skip(self) -> None:
        """Counts what was done before: it moves the bar, and not its speed."""
        if not self._bar.disable:
            self._bar.initial += 1
            self._bar.n += 1

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(self._postfix(time.perf_counter()))
        self._bar.close()

    def _postfix(self, now: float) -> str:
        speed = self._num_tokens / (now - self._started)
        num_cached, num_prompt = (
            count - before for count, before in zip(self._cache_counts(), self._before, strict=True)
        )
        hits = f", {num_cached / num_prompt:.0%} of prompts cached" if num_cached else ""
        return f"{speed:,.0f} tok/s, {self._stats()['num_running']} running{hits}"

    def _cache_counts(self) -> tuple[int, int]:
        stats = self._stats()
        return stats.get("num_cached_tokens", 0), stats.get("num_prompt_tokens", 0)
