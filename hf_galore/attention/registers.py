"""Register tokens: n embeddings of no word, trained, that stand in a sequence for attention to gather in.

In a decoder they come first, where every token sees them: the trained sink token of "Efficient Streaming Language
Models with Attention Sinks" (StreamingLLM, arXiv 2309.17453), section 3.3, and of "Massive Activations in Large
Language Models" (arXiv 2402.17762), section 4. In a vision transformer they are those of "Vision Transformers Need
Registers" (arXiv 2309.16588). Nothing is predicted from them and they are in no output. Deviation: StreamingLLM
pretrains with one; here there may be n, and models that were trained without any can be given some, which changes what
they compute.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_galore.checks import check_integer, check_number

STD = 0.02  # of the embeddings of the models in these papers


def check_registers(n_tokens: Any, std: Any) -> None:
    """Raises ValueError or TypeError for what `RegisterTokens` cannot have."""
    check_integer("n_tokens", n_tokens, low=1)
    check_number("std", std, low=0.0)


class RegisterTokens(nn.Module):
    """The embeddings, as one vector: optimizers decay, project and orthogonalise matrices, and this is none.

    Args:
        n_tokens: how many.
        dim: of an embedding.
        std: of the normal distribution that they start from.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    def __init__(
        self, n_tokens: int, dim: int, std: float = STD, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        check_registers(n_tokens, std)
        super().__init__()
        self.n_tokens = n_tokens
        self.tokens = nn.Parameter(torch.empty(n_tokens * dim, device=device, dtype=dtype).normal_(0.0, std))

    def forward(self, device: torch.device) -> Tensor:
        """(n_tokens, dim) on a device: a copy, which an engine that frees parameters after their use cannot empty."""
        return self.tokens.to(device, copy=True).view(self.n_tokens, -1)

    def extra_repr(self) -> str:
        return f"n_tokens={self.n_tokens}"
