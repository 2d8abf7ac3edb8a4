"""What plain transformers makes of exported checkpoints. Run as a script, in a process without hf_galore.

    python -c "<this file>" request.json

request.json: a list of checkpoints, each {directory, converted: names of modules, tokens, output}. For each of them
the file `output` (JSON) gets digests of the codes that the converted modules compute with and of the state dict, and
`output`.safetensors the logits on the tokens: `loaded`, as from_pretrained gives the model; and `float32`, with every
float cast to float32, so that what is compared is the checkpoint and not the arithmetic of bfloat16.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """A hash of shape and values; floats are hashed as float32, whatever dtype they are in."""
    tensor = tensor.detach().cpu().contiguous()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def computed_codes(module: Any) -> Tensor:
    """The codes (m, n), int8, that a layer of transformers multiplies with."""
    from transformers.integrations.bitnet import AutoBitLinear, WeightQuant, unpack_weights

    if not isinstance(module, AutoBitLinear):
        codes = unpack_weights(module.weight, dtype=torch.float32)
    elif module.online_quant:
        codes = WeightQuant.apply(module.weight.float()).sign()
    else:
        codes = module.weight
    return codes.detach().to(torch.int8)


def cast_to_float32(model: torch.nn.Module) -> None:
    """Casts all floats, and what BitLinear notes of its dtype."""
    torch.nn.Module.float(model)
    for module in model.modules():
        if "dtype" in vars(module):
            vars(module)["dtype"] = torch.float32


@torch.no_grad()
def examine(directory: str, converted: list[str], tokens: list[list[int]], output: str) -> None:
    """Loads the checkpoint and writes what it computes."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    codes = {name: digest(computed_codes(model.get_submodule(name))) for name in converted}
    state = {key: digest(value) for key, value in model.state_dict().items()}
    ids = torch.tensor(tokens)
    logits = {"loaded": model(input_ids=ids, use_cache=False).logits.float()}
    if model.dtype != torch.float32:
        cast_to_float32(model)
        logits["float32"] = model(input_ids=ids, use_cache=False).logits
    else:
        logits["float32"] = logits["loaded"].clone()
    save_file(logits, output + ".safetensors")
    with open(output, "w") as file:
        json.dump({"codes": codes, "state": state}, file)


def main() -> None:
    sys.modules["hf_galore"] = None  # type: ignore[assignment]  # import hf_galore fails, wherever it is installed
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        examine(**request)
    assert not any(name.startswith("hf_galore.") for name in sys.modules)


if __name__ == "__main__":
    main()
