"""The tokenizer that a GGUF file describes in its metadata.

Built from `tokenizers`: transformers' own way differs from release to release, and imports torch.

Source: how llama.cpp's llama-vocab.cpp reads the same metadata; `tokenizer.json` of Llama 2 and 3,
Qwen2.5 and Mistral Nemo.
"""

from collections.abc import Sequence
from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.gguf_file import GGUFFile

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "deepseek-r1-qwen": QWEN2_SPLIT,
    "llama-bpe": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT,
    "smaug-bpe": LLAMA3_SPLIT,
    "tekken": TEKKEN_SPLIT,
}
"""`tokenizer.ggml.pre` -> the pattern by which texts are split before they are merged."""

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Kinds of `tokenizer.ggml.token_type` that are matched whole."""

SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(file: GGUFFile) -> Any:
    """Builds the Hugging Face tokenizer of a GGUF file, chat template included.

    Raises:
      ConfigError: If the file describes none, or one of another kind.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens, model = _get(file, "tokens", []), _get(file, "model")
    if model == "gpt2" and _get(file, "pre") in SPLITS:
        backend = _byte_level(file, tokens)
    elif model == "llama":
        backend = _sentencepiece(file, tokens)
    else:
        raise ConfigError(
            f"No tokenizer could be built from {file.path}: its kind is {model!r}, its "
            f"pre-tokenizer {_get(file, 'pre')!r}; supported: 'llama', and 'gpt2' with one of "
            f"{', '.join(SPLITS)}. Set `tokenizer_path` to the folder of one, or pass "
            "skip_tokenizer_init=True and work with `input_ids`."
        )
    kinds = _get(file, "token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            is_special = kind != USER_DEFINED
            added = AddedToken(token, normalized=False, special=is_special)
            (backend.add_special_tokens if is_special else backend.add_tokens)([added])
    ids = {name: _get(file, key) for name, key in SPECIAL_TOKENS.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
        add_bos_token=_get(file, "add_bos_token", model == "llama"),
        add_eos_token=_get(file, "add_eos_token", False),
    )
    tokenizer.chat_template = file.get("tokenizer.chat_template")
    return tokenizer


def _get(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.get(f"tokenizer.ggml.{key}", default)


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = SPLITS[_get(file, "pre")]
    merges = [tuple(merge.split(" ")) for merge in _get(file, "merges", [])]
    # Llama 3 takes a word that is a token as it is, whatever its merges would make of it.
    model = models.BPE(_ids(tokens), merges, ignore_merges=split == LLAMA3_SPLIT)
    tokenizer: Any = Tokenizer(model)
    if split == QWEN2_SPLIT:
        tokenizer.normalizer = normalizers.NFC()  # a GGUF file has no place to say so
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = tokens[_get(file, "unknown_token_id", 0)]
    merges = _merges(tokens, _get(file, "scores", []))
    model = models.BPE(_ids(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer: Any = Tokenizer(model)
    begin = [normalizers.Prepend("▁")] if _get(file, "add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if begin else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens whose whole is one, the whole with the best score first."""
    known = set(tokens)
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in best_first)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
