"""The device room: weights, KV pages, slots, compiled steps, and the one border to the host."""
