"""Loading tokenizers and encoding prompts."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import jaxengine
from jaxengine.errors import ConfigError
from jaxengine.text.tokenizer import encode, eos_token_ids, load_tokenizer

TOKENIZER = load_tokenizer(jaxengine.DEMO_MODEL)


def test_loading_is_silent_and_imports_no_torch():
    code = (
        "import sys, jaxengine; from jaxengine.text.tokenizer import load_tokenizer; "
        "load_tokenizer(jaxengine.DEMO_MODEL); print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False False\n", "")


def test_encode_is_batched_and_round_trips():
    texts = ["To be, or not to be", "  ünï\n\n🙂", "x"]
    ids = encode(TOKENIZER, texts)
    assert ids == [TOKENIZER.encode(text) for text in texts]
    assert [TOKENIZER.decode(row) for row in ids] == texts
    assert encode(TOKENIZER, []) == []


def test_encode_says_nothing_about_long_texts(caplog: pytest.LogCaptureFixture):
    assert len(encode(TOKENIZER, ["to be " * 2000])[0]) > TOKENIZER.model_max_length
    assert not caplog.records


def test_encode_may_be_called_from_many_threads():
    texts = ["Now is the winter of our discontent " * 20] * 20
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: encode(TOKENIZER, texts), range(32)))
    assert all(result == results[0] for result in results)


def test_eos_ids_are_the_union():
    eos = TOKENIZER.eos_token_id
    assert eos_token_ids(TOKENIZER) == (eos,)
    assert eos_token_ids(TOKENIZER, eos, [7, 3], None) == tuple(sorted({eos, 3, 7}))
    assert eos_token_ids(None, None) == ()


@pytest.mark.parametrize("files", [[], ["config.json"]])
def test_a_folder_without_a_tokenizer_is_refused(files: list[str], tmp_path: Path):
    for name in files:
        shutil.copy(Path(jaxengine.DEMO_MODEL) / name, tmp_path)
    with pytest.raises(ConfigError, match=r"No tokenizer could be loaded from .* `tokenizer_path`"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="No tokenizer could be loaded from"):
        load_tokenizer(tmp_path)
