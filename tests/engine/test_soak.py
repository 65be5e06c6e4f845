"""Ten thousand requests of all kinds: nothing is left behind in the host's memory."""

import gc
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

import jaxengine
from tests.engine.conftest import assert_idle

STATM = Path("/proc/self/statm")
PAGE_BYTES = 4096
NUM_REQUESTS, NUM_WARM = 10_000, 2_000
WORDS = "ROMEO JULIET the king what light a horse my lord speak again and so good night".split()


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE_BYTES


def some_requests(engine: Any, rng: random.Random) -> int:
    """A call of a random kind; how many requests it was."""
    count = rng.choice([1, 1, 8, 20])
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]
    params = {"max_new_tokens": rng.randint(1, 12), "temperature": rng.choice([0.0, 1.0])}
    options = rng.choice([{}, {"timeout_s": 600.0}, {"cache_salt": "x"}, {"return_logprob": True}])
    kind = rng.choice(["whole", "whole", "stream", "left", "stop"])
    if kind == "whole":
        engine.generate(prompts, params, **options)
    elif kind == "stop":
        engine.generate(prompts, params | {"stop": ["lord", "\n"]}, on_error="return", **options)
    else:
        stream = engine.generate(prompts, params, stream=True, **options)
        for _ in itertools.islice(stream, 3 if kind == "left" else None):
            pass
        stream.close()
    return count


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not STATM.exists(), reason="reads /proc/self/statm")
def test_ten_thousand_requests_leave_the_memory_as_it_was(demo_settings: dict[str, Any]):
    rng = random.Random(0)
    with jaxengine.Engine(model_path=jaxengine.DEMO_MODEL, **demo_settings) as engine:
        engine.wait_until_compiled()
        num_done, warm = 0, 0
        while num_done < NUM_REQUESTS:
            num_done += some_requests(engine, rng)
            if not warm and num_done >= NUM_WARM:
                warm = resident_bytes()
        assert_idle(engine)
        growth = resident_bytes() / warm - 1
        assert engine.stats()["num_finished"] >= NUM_REQUESTS
    assert growth < 0.05, f"resident memory grew by {growth:.1%} from {warm / 1e6:.0f} MB"
