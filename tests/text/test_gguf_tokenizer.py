"""The tokenizer in a GGUF file's metadata is the one it was written from."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import jaxengine
from jaxengine.errors import ConfigError
from jaxengine.text.tokenizer import load_tokenizer
from tests.gguf_files import add_tokenizer

DEMO = load_tokenizer(jaxengine.DEMO_MODEL)
TEXTS = [
    "To be, or not to be",
    "naïve café, 東京, 🙂 \t\n\n  odd   spaces 1234",
    "e\u0301 is normalised",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def write(path: Path, add: Callable[[gguf.GGUFWriter], None], architecture: str = "qwen2") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    return write(path, lambda writer: add_tokenizer(writer, DEMO))


def test_byte_level_tokenizer_comes_back(demo_gguf: Path):
    tokenizer = load_tokenizer(demo_gguf)
    assert len(tokenizer) == len(DEMO)
    for text in TEXTS:
        ids = DEMO.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == DEMO.decode(ids)
        skipping = tokenizer.decode(ids, skip_special_tokens=True)
        assert skipping == DEMO.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_id == DEMO.eos_token_id
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == DEMO.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_loading_imports_no_torch(demo_gguf: Path):
    code = (
        "import sys; from jaxengine.text.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(demo_gguf)!r}); print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False False\n", "")


def test_sentencepiece_tokenizer_puts_bos_first(tmp_path: Path):
    """Merges follow the scores: the pair whose whole has the best one comes first."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    scores = [0.0, 0.0, 0.0, -6.0, -4.0, -5.0, -1.0, -3.0, -2.0]
    kinds = [2, 3, 3, 1, 1, 1, 1, 1, 1]  # unknown, control, normal

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    tokenizer = load_tokenizer(write(tmp_path / "llama.gguf", add, "llama"))
    assert tokenizer.encode("ab aab") == [1, 8, 6, 7]
    assert tokenizer.decode([8, 6, 7]) == "ab aab"
    assert tokenizer.encode("</s>a")[:2] == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_unknown_tokenizer_is_refused_with_the_remedy(tmp_path: Path):
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a"])

    with pytest.raises(ConfigError, match=r"'rwkv'.*supported: .*qwen2.*Set `tokenizer_path`"):
        load_tokenizer(write(tmp_path / "rwkv.gguf", add))
