"""Pure building blocks of models: norms, products, rotary embedding, paged attention."""
