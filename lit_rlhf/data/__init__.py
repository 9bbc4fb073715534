"""Rows to typed batches: formats and sources, tokenisation, micro-batches by token budget, data modules."""
