"""Pretrains a BitNet b1.58 from nothing, and the same model with full-precision weights, and lets it write.

    python examples/bitnet_pretrain.py                    # about 8 minutes on two CPU cores
    python examples/bitnet_pretrain.py --optim galore_adamw --config 60m --text texts/

Arguments are those of pretrain.py. Each --optim trains both models, with the same data in the same order. The ternary
one ends as a checkpoint of plain transformers, <output_dir>/<optim>_bitnet, with which another process, without
hf_galore, then continues a text.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from pretrain import parse, train_in_child
from report import table
from transformers import Trainer

import hf_galore

PROMPT = "def "
WRITE = """
import sys
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2])
ids = tokenizer(sys.argv[3], return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)[0]))
"""


def main() -> None:
    settings = parse()
    output_dir = Path(settings.output_dir)
    runs = []
    for optim in settings.optim:
        for bitlinear in (False, True):
            settings.bitlinear = bitlinear
            result = train_in_child(settings, optim, export if bitlinear else None)
            runs.append({**result, "optim": f"{optim}, {'ternary' if bitlinear else 'full precision'}"})
    (output_dir / "table.md").write_text(table(runs) + "\n")
    print(f"\n{table(runs)}")
    for optim in settings.optim:
        checkpoint = output_dir / f"{optim}_bitnet"
        written = write(checkpoint, output_dir / "corpus" / "tokenizer.json")
        print(f"\nplain transformers, from {checkpoint}:\n{written}")


def export(trainer: Trainer, folder: Path) -> None:
    """Saves the trained model for plain transformers."""
    checkpoint = folder.with_name(folder.name.replace("_ternary", "_bitnet"))
    shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier run
    print(hf_galore.save_bitnet(trainer.model, checkpoint))


def write(checkpoint: Path, tokenizer: Path) -> str:
    """What plain transformers makes of the checkpoint and a prompt."""
    command = [sys.executable, "-c", WRITE, str(checkpoint), str(tokenizer), PROMPT]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
