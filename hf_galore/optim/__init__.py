"""Optimizers: one file per rule over one shared shell (`optimizer.py`)."""
