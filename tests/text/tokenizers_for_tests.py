"""Small tokenizers of the three decoder families, built on the spot."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and again the fox",
    "naïve café, Größe, señor, 你好世界, こんにちは, привет, 🙂🙃 👩‍👩‍👧 end\n\n",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_end|>"]


def _wrap(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[0], extra_special_tokens=[SPECIALS[1]]
    )


def byte_level() -> Any:
    """A byte-level BPE with merges, special tokens and plain added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["two words", "naïf", "世界", AddedToken("<tool>", special=False)])
    return _wrap(tokenizer)


def byte_fallback() -> Any:
    """Like Llama 2: words begin with ▁, unknown characters are single byte tokens."""
    words = ["▁the", "▁fox", "▁", "a", "b", "ing", "é"]
    tokens = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return _wrap(tokenizer)


def word_piece() -> Any:
    """Like BERT: words are joined by spaces, ## continues one."""
    tokens = ["[UNK]", *SPECIALS, "the", "fox", "##es", "##ing", "jump", "x"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(SPECIALS)
    return _wrap(tokenizer)
