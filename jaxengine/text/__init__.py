"""Text in and out: prompts to token ids, generated ids to text. Knows nothing of jax."""
