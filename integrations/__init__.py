"""Glue between hf_galore and the libraries around it: one file per library, no mathematics."""

from hf_galore.integrations.transformers import register, unregister

__all__ = ["register", "unregister"]
