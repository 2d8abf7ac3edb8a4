"""Attention: explicit biases, sinks, caches, and a report of massive activations."""
