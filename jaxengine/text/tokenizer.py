"""Loads a tokenizer and turns prompts into ids. Knows nothing of the engine."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.gguf_file import GGUFFile, is_gguf
from jaxengine.text.gguf_tokenizer import tokenizer_from_gguf


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """Loads the Hugging Face tokenizer of a folder or hub id, or that of a GGUF file.

    A folder with a `tokenizer.json` is taken at its word; anything else goes through
    `AutoTokenizer`, which may import torch where torch is installed.

    Raises:
      ConfigError: When there is no usable tokenizer.
    """
    if is_gguf(path):
        with _no_advice():
            return tokenizer_from_gguf(GGUFFile(Path(path)))
    with _no_advice():
        from transformers import PreTrainedTokenizerFast as Tokenizer

        # NOTE: AutoTokenizer imports torch where it can, and rebuilds parts of `tokenizer.json`
        # (the normalizer, the pre-tokenizer) from the model type.
        if trust_remote_code or not (Path(path) / "tokenizer.json").is_file():
            from transformers import AutoTokenizer as Tokenizer

        try:
            tokenizer = Tokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, revision=revision or "main"
            )
        except (OSError, ValueError, ImportError) as error:
            raise _no_tokenizer(path, " ".join(str(error).split())) from error
    # NOTE: from a folder with a config.json alone, transformers makes an empty tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise _no_tokenizer(path, "it has no vocabulary files")
    return tokenizer


def set_chat_template(tokenizer: Any, template: str | None, name: str | None) -> None:
    """Chooses how `messages` become a prompt; nothing changes where both are None.

    Args:
      tokenizer: Is changed.
      template: A Jinja template, or the file of one.
      name: Which of the tokenizer's own, where it has several.

    Raises:
      ConfigError: For a file or name that is not there.
    """
    if template is not None:
        is_inline = "{" in template
        if not is_inline and not Path(template).is_file():
            raise ConfigError(
                f"`chat_template` {template!r} is neither a Jinja template nor a file; SGLang's "
                "built-in names are not known here. Leave it out for the tokenizer's own."
            )
        tokenizer.chat_template = template if is_inline else Path(template).read_text()
    elif name is not None:
        choices = tokenizer.chat_template
        if not isinstance(choices, dict) or name not in choices:
            known = ", ".join(choices) if isinstance(choices, dict) else "none by name"
            raise ConfigError(f"`hf_chat_template_name` {name!r} is not there; it has {known}.")
        tokenizer.chat_template = choices[name]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens the tokenizer adds by itself."""
    return tokenizer(list(texts), verbose=False)["input_ids"] if texts else []


def eos_token_ids(tokenizer: Any, *more: int | Iterable[int] | None) -> tuple[int, ...]:
    """Ids that end a text, ascending: the tokenizer's own and those of the configs given.

    Args:
      tokenizer: None when the engine has none.
      more: `eos_token_id` of config.json and generation_config.json, as they stand there.
    """
    ids: set[int] = set()
    for item in (getattr(tokenizer, "eos_token_id", None), *more):
        ids |= set() if item is None else {item} if isinstance(item, int) else set(item)
    return tuple(sorted(ids))


def _no_tokenizer(path: str | Path, cause: str) -> ConfigError:
    return ConfigError(
        f"No tokenizer could be loaded from {str(path)!r}: {cause.rstrip('.')}. Set "
        f"`tokenizer_path`, or pass skip_tokenizer_init=True and work with `input_ids`."
    )


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Drops what transformers logs on import where there is no torch."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "PyTorch" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
