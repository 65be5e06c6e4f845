"""The tokenizer that a GGUF file describes in its metadata.

transformers builds it, from values read here: its own reader of the file imports torch.
"""

from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.gguf_file import GGUFFile

FIELDS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_space_prefix": "add_prefix_space",
}
"""Keys below `tokenizer.ggml.` -> what transformers calls them."""

SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(file: GGUFFile) -> Any:
    """Builds the Hugging Face tokenizer of a GGUF file, chat template included.

    Raises:
      ConfigError: If the file describes none that transformers can build.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    described = {ours: file.get(f"tokenizer.ggml.{key}") for key, ours in FIELDS.items()}
    described = {name: value for name, value in described.items() if value is not None}
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer

        backend, _ = convert_gguf_tokenizer(file.architecture, described)
    except (ImportError, KeyError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer could be built from {file.path}: {error}. Set `tokenizer_path` to the "
            "folder of one, or pass skip_tokenizer_init=True and work with `input_ids`."
        ) from error
    if described.get("pre_tokenizer_type") == "qwen2":
        # Qwen2 normalises its texts; a GGUF file has no place to say so.
        backend.normalizer = normalizers.NFC()
    ids = {name: file.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL_TOKENS.items()}
    tokens = described["tokens"]
    # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    is_sentencepiece = described["tokenizer_type"] == "llama"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        add_bos_token=file.get("tokenizer.ggml.add_bos_token", is_sentencepiece),
        add_eos_token=file.get("tokenizer.ggml.add_eos_token", False),
    )
    tokenizer.chat_template = file.get("tokenizer.chat_template")
    return tokenizer
