"""The host room: who runs next, in which pages, in windows of which length. No jax."""
