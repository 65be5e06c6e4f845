"""Times transformers on a CPU: the same batches as `python -m jaxengine.bench cpu`, as JSON lines.

    python tests/golden/time_transformers.py >> jaxengine/bench/results/cpu_peers.jsonl

Runs in an environment of its own (torch, transformers; no jax), on as many threads as there are
cores for it. Random weights in float32, greedy, the dynamic cache that `generate` takes by itself.
"""

import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

DEMO = Path(__file__).parents[2] / "jaxengine" / "assets" / "demo" / "config.json"
HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SHAPES = {"demo": (json.loads(DEMO.read_text()), 256), "qwen2.5-0.5b": (HALF_BILLION, 32)}
RUNS = 3


def seconds(model: torch.nn.Module, ids: torch.Tensor, num_tokens: int) -> float:
    """Generates so many tokens for every row."""
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    assert out.shape[1] == ids.shape[1] + num_tokens
    return time.perf_counter() - started


def main() -> None:
    """Prints a row for every shape and batch."""
    num_cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_cpus)
    torch.manual_seed(0)
    for name, (raw, num_steps) in SHAPES.items():
        config = transformers.Qwen2Config(**{**raw, "dtype": "float32"})
        model = transformers.Qwen2ForCausalLM(config).float().eval()
        for num_rows in (1, 8):
            ids = torch.randint(0, min(10000, config.vocab_size), (num_rows, 32))
            seconds(model, ids, 4)
            spent = [
                seconds(model, ids, 1 + num_steps) - seconds(model, ids, 1) for _ in range(RUNS)
            ]
            runs = [num_rows * num_steps / s for s in spent]
            row = {
                "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
                "workload": f"cpu_{name}_b{num_rows}",
                "metric": "decode_tokens_per_s",
                "value": statistics.median(runs),
                "unit": "tok/s",
                "runs": runs,
                "spread": max(runs) - min(runs),
                "is_correct": True,
                "environment": {
                    "num_cpus": num_cpus,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                },
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
