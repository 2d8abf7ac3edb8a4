"""Model sizes and the training settings that go with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A Llama and how to train it. Lengths are in tokens; batch_size is the sequences of one optimizer step."""

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    rank: int
    max_steps: int
    update_proj_gap: int = 200
    scale: float = 0.25
    galore_lr: float = 1e-2
    adamw_lr_matrices: float = 1e-3
    adamw_lr_rest: float = 1e-3
    adam_beta2: float = 0.999
    vocab_size: int = 32000
    tie_embeddings: bool = False
    seq_len: int = 256
    batch_size: int = 512
    micro_batch_size: int = 16


PRESETS = {
    # About 9 million parameters, minutes on two CPU cores. Embeddings and head are one tied matrix: untied, they
    # would be a quarter of so small a model. The rank is a quarter of hidden_size, as the paper has it. For AdamW's
    # usual beta2, 0.999, the run is too short. The learning rates are the best of
    # benchmarks/results/learning_rate_grid.csv, whose runs have 480 steps: in so short a run embeddings want a far
    # larger rate than matrices, which for GaLore means a large lr and a small scale.
    "demo": Preset(
        *(320, 864, 5, 6),
        rank=80,
        max_steps=400,
        update_proj_gap=50,
        galore_lr=8e-2,
        scale=1 / 64,
        adamw_lr_matrices=5e-4,
        adamw_lr_rest=8e-2,
        adam_beta2=0.95,
        vocab_size=4096,
        tie_embeddings=True,
        batch_size=2,
        micro_batch_size=2,
    ),
    # Seconds: for tests.
    "tiny": Preset(
        *(32, 64, 2, 2),
        rank=8,
        max_steps=4,
        update_proj_gap=2,
        adamw_lr_rest=1e-2,
        vocab_size=512,
        tie_embeddings=True,
        seq_len=32,
        batch_size=4,
        micro_batch_size=4,
    ),
    # The GaLore paper's models, with its settings for GaLore (arXiv 2403.03507). AdamW's rates are a usual choice, not
    # a tuned one: tune both before you compare anything.
    "60m": Preset(*(512, 1376, 8, 8), rank=128, max_steps=10_000),
    "130m": Preset(*(768, 2048, 12, 12), rank=256, max_steps=20_000),
    "350m": Preset(*(1024, 2736, 16, 24), rank=256, max_steps=60_000),
    "1b": Preset(*(2048, 5461, 32, 24), rank=512, max_steps=100_000),
    "7b": Preset(*(4096, 11008, 32, 32), rank=1024, max_steps=150_000, update_proj_gap=500, galore_lr=5e-3),
}
