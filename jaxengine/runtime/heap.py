"""Which objects Python's garbage collector walks while an engine runs. The only owner of `gc`.

jax, transformers and what tracing leaves are some hundred thousand objects that live as long as the
process. A full collection walks all of them, stops every thread for a third of a second, and may
come inside any call. Frozen, they are left out of it, as servers do after their start.
"""

import gc

_holders: set[object] = set()  # engines that live; one operation each, so no lock is needed
_unexamined: set[object] = set()  # of them, whose start froze garbage along with the rest


class Heap:
    """An engine's wish that full collections be short, from its start to its end.

    What is frozen is still freed when nothing refers to it. Only a reference cycle among objects
    older than the last `settle` stays, until the last engine closes.

    Source: `gc.freeze`, docs.python.org; vLLM and SGLang call it when their servers are warm.
    """

    def __init__(self) -> None:
        """Freezes what is there, so that no collection walks it while programs are traced."""
        _holders.add(self)
        if len(_holders) == 1:
            _unexamined.add(self)
            gc.freeze()

    def settle(self) -> None:
        """Collects garbage and freezes the rest: what was made since the last time, and, at first,
        what was there before the engine. Called when nothing is left to compile.
        """
        if self not in _holders:
            return
        if _unexamined:
            _unexamined.clear()
            gc.unfreeze()
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Leaves all to the collector again, if no other engine lives. Idempotent."""
        _holders.discard(self)
        if not _holders:
            _unexamined.clear()
            gc.unfreeze()
