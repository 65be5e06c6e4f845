"""SGLang's names of what an Engine can do, and their return values. Nothing is done here.

Failures are returned as SGLang returns them, where it does; our own methods raise.
"""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxengine.compat import METHODS, nearest
from jaxengine.errors import JaxEngineError


class CacheFlush(NamedTuple):
    """What `Engine.flush_cache` gives.

    Attributes:
      success: Always True: here the cache can be flushed at any time.
    """

    success: bool


class SGLangNames:
    """Aliases; `Engine` has what they call."""

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Our name for SGLang's, or why there is none."""
            known = METHODS.get(name)
            if known is not None and known.fate == "mapped":
                return getattr(self, known.target)
            if known is not None and known.fate == "refused":
                raise AttributeError(f"`Engine.{name}` is not supported: {known.why}.")
            raise AttributeError(f"Engine has no attribute `{name}`{nearest(name, dir(self))}")

    def update_weights_from_tensor(
        self: Any, named_tensors: Any, load_format: str | None = None, flush_cache: bool = True
    ) -> tuple[bool, str]:
        """`update_weights` of some tensors by their checkpoint names; the others stay.

        The cache is always flushed: it would hold keys and values of other weights.
        """
        if load_format not in (None, "direct"):
            return False, f"`load_format` {load_format!r} is not supported; pass names and arrays."
        return _told(lambda: self.update_weights(named_tensors, partial=True))

    def update_weights_from_disk(
        self: Any, model_path: str, load_format: str | None = None
    ) -> tuple[bool, str, int]:
        """`update_weights` from a folder or hub id; `model_path` and `served_model_name` follow."""
        return *_told(lambda: self.update_weights(model_path)), 0

    def abort_request(self: Any, rid: str = "", abort_all: bool = False) -> None:
        """`abort` or `abort_all`; the id must be exact, where SGLang's is a prefix."""
        if abort_all:
            self.abort_all()
        else:
            self.abort(rid)

    def pause_generation(self: Any, mode: str = "abort") -> None:
        """`pause`, which aborts everyone unless told otherwise, as SGLang does."""
        self.pause(mode)

    def continue_generation(self: Any) -> None:
        """`resume`."""
        self.resume()

    def get_weights_by_name(self: Any, name: str, truncate_size: int = 100) -> list[Any] | None:
        """The first rows of a tensor by its checkpoint name, as lists; None for an unknown name."""
        array = self.weights_by_name(name)
        return None if array is None else np.asarray(array[:truncate_size], np.float32).tolist()

    def release_memory_occupation(self: Any, tags: Collection[str] | None = None) -> None:
        """`release_memory`, keeping a copy of the weights on the host."""
        self.release_memory(tags)

    def resume_memory_occupation(self: Any, tags: Collection[str] | None = None) -> None:
        """`resume_memory`."""
        self.resume_memory(tags)

    def get_model_info(self: Any) -> dict[str, Any]:
        """Which model this is, in SGLang's words, and its shape."""
        return {
            "model_path": self.config.model_path,
            "served_model_name": self.config.served_model_name or self.config.model_path,
            "is_generation": True,
            "weight_version": self._residency.version,
            "load_format": self.config.load_format,
            **dataclasses.asdict(self.model_config),
        }

    def get_server_info(self: Any) -> dict[str, Any]:
        """The resolved settings, the limits that follow from them, and `stats` as SGLang has it."""
        stats, config = self.stats(), self.config
        assert config.context_length and config.max_total_tokens, "the config is resolved"
        return {
            **dataclasses.asdict(config),
            "status": "ready",
            "weight_version": self._residency.version,
            "max_total_num_tokens": config.max_total_tokens,
            "max_req_input_len": min(config.context_length, config.max_total_tokens) - 1,
            "startup_time": self._startup_seconds,
            "internal_states": [{**stats, "last_gen_throughput": stats["generated_tokens_per_s"]}],
        }

    def get_all_child_pids(self) -> list[int]:
        """None: the engine is this process."""
        return []


def _told(action: Any) -> tuple[bool, str]:
    """Whether it worked, and what is to be said."""
    try:
        action()
    except JaxEngineError as error:
        return False, f"Failed to update weights: {error}"
    return True, "Succeeded to update model weights."
