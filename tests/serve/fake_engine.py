"""An engine that answers at once, as a plain function of the request and its seed."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from jaxengine.errors import PromptTooLongError, RequestError
from jaxengine.params import derive_seed
from tests.text.tokenizers_for_tests import byte_level

CONTEXT_LENGTH = 64
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    made = byte_level()
    made.chat_template = CHAT_TEMPLATE
    return made


class FakeEngine:
    """What a batch job needs of `jaxengine.Engine`.

    Attributes:
      hook: Called with the number of every item before it is answered.
      params: As an engine's; nobody computes with them.
      sampler: Likewise.
      version: Of the weights.
    """

    params: Any = None
    sampler: Any = None
    version = "default"

    def __init__(self, hook: Callable[[int], object] = lambda _: None, **_: Any) -> None:
        self.tokenizer = tokenizer()
        self.config = SimpleNamespace(
            model_path="",
            context_length=CONTEXT_LENGTH,
            served_model_name="fake",
            weight_version="default",
        )
        self.hook = hook

    def get_model_info(self) -> dict[str, Any]:
        return {"weight_version": self.version}

    def stats(self) -> dict[str, Any]:
        return {"max_total_tokens": 1000, "num_running": 0}

    def imap(
        self, items: Any, *, max_in_flight: Any, ordered: bool, on_error: str
    ) -> Iterator[Any]:
        assert on_error == "return"
        for place, item in enumerate(items):
            self.hook(place)
            try:
                result = self.answer(item)
            except RequestError as error:
                result = error
            yield result if ordered else (place, result)

    def answer(self, item: Any) -> Any:
        if isinstance(item, RequestError):
            raise item
        params, ids = item["sampling_params"], item["input_ids"]
        if len(ids) >= CONTEXT_LENGTH:
            raise PromptTooLongError("too long")
        if not 0 <= params.get("temperature", 1) < 10:
            raise RequestError("`temperature` must be in [0, 10).")
        outputs = []
        for sample in range(params.get("n", 1)):
            seed = derive_seed(params["seed"], item["seed_key"], sample)
            meta = {
                "seed": seed,
                "finish_reason": {"type": "length", "length": 2},
                "prompt_tokens": len(ids),
                "completion_tokens": 2,
            }
            text = f"{self.tokenizer.decode(ids)}|{seed % 1000}"
            outputs.append({"text": text, "output_ids": [seed % 7, 1], "meta_info": meta})
        return outputs if "n" in params else outputs[0]

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass
