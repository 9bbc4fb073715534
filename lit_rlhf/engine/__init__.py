"""Tensors and layouts: packed rows, attention over them, log-probs without the (B, S, V) tensor, sharding."""
