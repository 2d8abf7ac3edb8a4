"""Layers with ternary weights and 8-bit activations (BitNet b1.58, arXiv 2402.17764)."""
