"""Every preset of `configs/` is an EngineConfig, and settings are checked when they are made."""

from pathlib import Path

import pytest

from jaxengine.config import EngineConfig
from jaxengine.errors import ConfigError

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads(path: Path):
    config = EngineConfig.from_toml(path)
    assert config.ignored == ()
    assert config != EngineConfig()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"page_size": 0}, "`page_size` must be a positive integer, got 0"),
        ({"max_total_tokens": True}, "`max_total_tokens` must be a positive integer"),
        ({"mem_fraction_static": 1.5}, r"`mem_fraction_static` must be in \(0, 1\), got 1.5"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"decode_buckets": [4, 2]}, "`decode_buckets` must be ascending"),
        ({"chunked_prefill_size": -2}, "`chunked_prefill_size` must be a positive integer or -1"),
    ],
)
def test_bad_setting_is_named(setting: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(setting)
