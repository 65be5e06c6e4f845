"""Where an engine's weights, tokenizer and programs come from."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import Engine, sampling
from jaxengine.build import read_model_config
from jaxengine.errors import ConfigError, WeightsError
from jaxengine.serve import cli
from tests.engine import tiny
from tests.engine.conftest import wait_for
from tests.gguf_files import write_gguf

GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
[PROMPT] = tiny.prompts_of(9)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def greedy_ids(engine: Any) -> list[int]:
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> Path:
    return tiny.write_checkpoint(tmp_path / "checkpoint", tokenizer=tokenizer)


def test_config_of_a_checkpoint_is_that_of_the_arrays_in_memory(checkpoint: Path):
    assert read_model_config(checkpoint) == tiny.CONFIG


@pytest.mark.parametrize("num_shards", [1, 3])
def test_checkpoint_gives_what_its_arrays_give(
    tmp_path: Path, make_engine: Any, tokenizer: Any, num_shards: int
):
    folder = tiny.write_checkpoint(tmp_path, num_shards=num_shards, tokenizer=tokenizer)
    engine = make_engine(model_path=folder)
    tiny.assert_greedy(PROMPT, greedy_ids(engine))
    output = engine.generate("the fox", GREEDY)
    assert output["text"] == tokenizer.decode(output["output_ids"])


def test_shards_are_counted_in_a_progress_bar(
    tmp_path: Path, make_engine: Any, capsys: pytest.CaptureFixture[str]
):
    folder = tiny.write_checkpoint(tmp_path, num_shards=3)
    make_engine(model_path=folder, skip_tokenizer_init=True, progress=True).wait_until_compiled()
    shown = capsys.readouterr().err
    assert "Loading safetensors checkpoint shards" in shown
    assert "3/3" in shown
    assert "Compiling" in shown
    make_engine(model_path=folder, skip_tokenizer_init=True, progress=False).wait_until_compiled()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("num_shards", [1, 2])
def test_tensors_that_do_not_fit_are_named_together(
    tmp_path: Path, make_engine: Any, num_shards: int
):
    tensors = dict(tiny.TENSORS)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.layers.1.self_attn.k_proj.bias"] = np.ones(7, np.float32)
    folder = tiny.write_checkpoint(tmp_path, tensors, num_shards=num_shards)
    with pytest.raises(WeightsError) as caught:
        make_engine(model_path=folder, skip_tokenizer_init=True)
    message = str(caught.value)
    assert "2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.1.self_attn.q_norm.weight" in message
    assert "2 misshapen: lm_head.weight is (383, 32), expected (384, 32), " in message
    assert "model.layers.1.self_attn.k_proj.bias is (7,), expected (32,)" in message
    assert str(folder) in message


def test_missing_shard_is_named(tmp_path: Path, make_engine: Any):
    folder = tiny.write_checkpoint(tmp_path, num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors"):
        make_engine(model_path=folder, skip_tokenizer_init=True)


def test_arrays_that_do_not_fit_are_named_together(make_engine: Any):
    arguments = tiny.engine_arguments()
    params = arguments["params"]
    del params["norm"]
    params["extra"] = {"weight": jnp.ones(3)}
    params["embed"]["weight"] = params["embed"]["weight"][:, :-1]
    with pytest.raises(WeightsError) as caught:
        make_engine(**arguments)
    for words in ("missing norm.weight", "unexpected extra.weight", "embed.weight is (384, 31)"):
        assert words in str(caught.value)


def test_arrays_and_their_config_go_together(settings: dict[str, Any]):
    with pytest.raises(TypeError, match="`params` and `model_config` go together"):
        Engine(params=tiny.engine_arguments()["params"], **settings)


def test_orbax_checkpoint_gives_the_same(checkpoint: Path, tmp_path: Path, make_engine: Any):
    target = tmp_path / "converted"
    assert cli.main(["convert", str(checkpoint), str(target)]) == 0
    assert not list(target.glob("*.safetensors"))
    engine = make_engine(model_path=target)
    tiny.assert_greedy(PROMPT, greedy_ids(engine))
    assert engine.generate("the fox", GREEDY)["text"]


def test_gguf_file_gives_what_its_tensors_give(tmp_path: Path, make_engine: Any, tokenizer: Any):
    path = write_gguf(tmp_path / "tiny.gguf", tiny.CONFIG, tiny.TENSORS, tokenizer=tokenizer)
    engine = make_engine(model_path=path)
    tiny.assert_greedy(PROMPT, greedy_ids(engine))
    output = engine.generate("the fox", GREEDY)
    assert output["meta_info"]["prompt_tokens"] == len(tokenizer.encode("the fox"))
    assert output["text"] == tokenizer.decode(output["output_ids"])
    with pytest.raises(ConfigError, match="`load_format` 'gguf' needs a"):
        make_engine(model_path=tmp_path, load_format="gguf")


def test_convert_does_not_write_over_anything(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["convert", str(checkpoint), str(checkpoint)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_dummy_weights_need_a_config_alone(tmp_path: Path, make_engine: Any):
    (tmp_path / "config.json").write_text(json.dumps(tiny.RAW_CONFIG))
    engine = make_engine(model_path=tmp_path, load_format="dummy", skip_tokenizer_init=True)
    ids = greedy_ids(engine)
    assert len(ids) == 16
    assert ids == greedy_ids(
        make_engine(model_path=tmp_path, load_format="dummy", skip_tokenizer_init=True)
    )
    with pytest.raises(ConfigError, match="tokenizer"):
        make_engine(model_path=tmp_path, load_format="dummy")


def make_hub_cache(cache: Path, checkpoint: Path, model_id: str) -> None:
    """A hub cache that holds the checkpoint, as huggingface_hub lays it out."""
    folder = cache / f"models--{model_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)


def test_hub_id_is_found_in_the_cache_in_any_letter_case(
    checkpoint: Path, tmp_path: Path, make_engine: Any
):
    cache = tmp_path / "hub"
    make_hub_cache(cache, checkpoint, "Some-Org/Tiny-Qwen2")
    for model_id in ("Some-Org/Tiny-Qwen2", "some-org/tiny-qwen2"):
        engine = make_engine(model_path=model_id, download_dir=str(cache))
        tiny.assert_greedy(PROMPT, greedy_ids(engine))
        assert engine.tokenizer is not None
    by_commit = make_engine(
        model_path="some-org/tiny-qwen2",
        download_dir=str(cache),
        revision=COMMIT,
        skip_tokenizer_init=True,
    )
    tiny.assert_greedy(PROMPT, greedy_ids(by_commit))


def test_unknown_hub_id_offline_says_what_was_looked_for_and_where(
    tmp_path: Path, make_engine: Any
):
    with pytest.raises(ConfigError) as caught:
        make_engine(model_path="nobody/nothing", download_dir=str(tmp_path))
    message = str(caught.value)
    assert "'nobody/nothing'" in message
    assert str(tmp_path) in message
    assert "models--nobody--nothing" in message
    with pytest.raises(ConfigError, match="is not a folder"):
        make_engine(model_path=str(tmp_path / "nowhere"))


def test_other_architectures_are_refused_by_name(tmp_path: Path, make_engine: Any):
    raw = {**tiny.RAW_CONFIG, "architectures": ["GemmaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"GemmaForCausalLM.*Qwen2ForCausalLM"):
        make_engine(model_path=tmp_path, skip_tokenizer_init=True)


def test_second_engine_loads_every_program(make_engine: Any, engine: Any):
    del engine  # the first
    second = make_engine()
    second.wait_until_compiled()
    programs = second.stats()["programs"]
    assert (programs["num_compiled"], programs["num_loaded"]) == (0, programs["num_programs"])
    tiny.assert_greedy(PROMPT, greedy_ids(second))


def test_executable_cache_must_be_private(tmp_path: Path, make_engine: Any):
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"`cache_dir` .* mode 0755") as caught:
        make_engine(cache_dir=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert f"chmod 700 {tmp_path}" in str(caught.value)


def test_executables_are_for_their_owner_alone(cache_dir: Path, engine: Any):
    del engine
    files = list(cache_dir.glob("*-*"))  # another worker may be writing a scratch file
    assert files
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_broken_executable_is_compiled_anew(
    tmp_path: Path, cache_dir: Path, make_engine: Any, engine: Any
):
    del engine
    folder = tmp_path / "copy"
    shutil.copytree(cache_dir, folder, ignore=shutil.ignore_patterns("tmp*"))
    folder.chmod(0o700)
    for file in folder.glob("admit-*"):
        file.write_bytes(b"garbage")
    mended = make_engine(cache_dir=str(folder))
    mended.wait_until_compiled()
    assert mended.stats()["programs"]["num_compiled"] == 1
    again = make_engine(cache_dir=str(folder))
    again.wait_until_compiled()
    assert again.stats()["programs"]["num_compiled"] == 0


def test_sampler_of_the_users_own_is_never_taken_from_the_cache(
    step_settings: dict[str, Any], step_engine: Any
):
    """It has the parameters of the built-in one, so the same shapes, and does something else."""
    del step_engine  # it has filled the executable cache

    def upside_down(logits: Any, state: Any, ctx: Any) -> Any:
        return -logits

    params = sampling.default_sampler().params
    sampler = sampling.Sampler(sampling.LogitsTransform(upside_down, params=params))
    with Engine(**tiny.engine_arguments(), **step_settings, sampler=sampler) as engine:
        ids = greedy_ids(engine)
    assert tiny.step_logits(PROMPT, ids).argmin(axis=-1).tolist() == ids


def test_resolved_settings_are_logged_in_one_block(
    make_engine: Any, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="jaxengine")
    make_engine()
    [block] = [m for m in caplog.messages if m.startswith("resolved configuration")]
    for words in ("context_length", "= 256", "max_total_tokens", "= 240", "float32"):
        assert words in block
    assert wait_for(lambda: any("from the executable cache" in m for m in caplog.messages))
