"""Which part of a transformers model is its decoder."""

from typing import Any

from transformers.modeling_utils import PreTrainedModel


def decoder_of(model: Any) -> Any:
    """The module with embeddings and blocks and without a head: what `get_decoder()` finds, or should find.

    In transformers 5.23 that finds the head where a model calls its head `decoder` (ModernBERT), and the whole model
    where this has the name of another part (Llama 4's text model).
    """
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is None:
        return decoder
    parts = (decoder if isinstance(decoder, PreTrainedModel) else model).modules()
    headless = (part for part in parts if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is None)
    return next(headless, decoder)
