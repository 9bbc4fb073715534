"""Hugging Face models as policy, reference, reward model and critic; the slot KV cache that they decode with."""
