"""Batch jobs: a file of prompts in, a file of results out, however often it is interrupted.

>>> from jaxengine.serve import batch
>>> batch.run("in.jsonl", "out.jsonl", model_path=..., sampling_params={"max_new_tokens": 64})

In: JSON lines, Parquet (a file or a folder of parts), plain text (a prompt a line), or OpenAI's
batch lines; `.gz` and `.zst` are seen by their ending, `-` is standard input. A row holds `prompt`,
`messages` (they go through the chat template) or `input_ids`; `custom_id` or `id`; and, in
`sampling_params`, its own parameters. Every other column is passed through.

Out: JSON lines, or, where the name ends in `.parquet`, a folder of Parquet parts. A row has

    id              custom_id, else a hash of the row; unique in the file
    text            the continuation; null in an error row
    output_ids      its token ids, with `output_ids=True`
    finish_reason   "stop", "length" or "abort"
    seed            replays this sample alone, with any engine over the same model
    usage           {prompt_tokens, completion_tokens, truncated_tokens}; null in an error row
    error           null, or {type, message, line}; `line` counts from 1 in the input
    ...             the other columns of its input row; `input_NAME` where NAME is one of these

and, for n > 1, `texts`, `finish_reasons`, `seeds` and lists in `output_ids` instead of the
singular. In Parquet all of these columns exist, and are null where they do not apply; other columns
of a JSON input stand together in `input`, as JSON text. OpenAI's batch lines are answered with
OpenAI's batch lines.

A row is known by its id, and its noise derives from (the job's seed, its id): it does not matter in
which order, in which shard, and after how many interruptions it is computed. A row's own `seed` is
taken as it is. A job that was killed goes on where it was when it is run again; a file beside OUT
says what the job was, and holds the lock that keeps a second run away.
"""

from jaxengine.serve.batch.check import dry_run
from jaxengine.serve.batch.config import BatchConfig, Report, Shard
from jaxengine.serve.batch.job import run

__all__ = ["BatchConfig", "Report", "Shard", "dry_run", "run"]
