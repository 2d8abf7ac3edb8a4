"""Who stands behind the Trainer's GaLore names: hf_galore (`ours`) or galore-torch (`incumbent`)."""

import gc

import pytest

import hf_galore


@pytest.fixture
def ours():
    """hf_galore behind the GaLore names, for one test."""
    hf_galore.register()
    yield
    hf_galore.unregister()


@pytest.fixture
def incumbent():
    """galore-torch behind the GaLore names, as transformers finds it."""
    pytest.importorskip("galore_torch")
    hf_galore.unregister()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Spares imported modules from gc.collect(), which train() calls: over transformers it takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
