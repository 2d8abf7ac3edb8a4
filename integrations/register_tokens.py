"""Register tokens on models of transformers, a decoder's trained sink token among them: `add_register_tokens`.

    hf_galore.add_register_tokens(model, n_tokens=1)       # a decoder: a sink token; a vision transformer: registers

The embeddings are in a new child, `bias_tokens`, of the decoder or of the vision transformer's embeddings (a name with
"bias", which transformers' Trainer does not decay). As an adapter of peft: `RegisterTokensConfig`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from hf_galore.attention.blocks import find_blocks
from hf_galore.attention.registers import STD, RegisterTokens, check_registers
from hf_galore.integrations import register_decoder, register_vision
from hf_galore.integrations.attention_modules import example_of
from hf_galore.integrations.decoders import decoder_of, embeddings_of, keeps_keys, makes_masks, trial_of
from hf_galore.integrations.register_decoder import CHILD, hook_decoder, masks_later
from hf_galore.integrations.register_vision import EMBEDDINGS, hook_vision

_MASKS = "create_masks_for_generate"  # which generate() asks the model for, if it has it
_REFUSALS = (RuntimeError, ValueError, LookupError, AttributeError, TypeError)  # that a trial run may end in
_EFFECT = 1e-3  # of a token on the output of an earlier one, in units of that on its own


class Home(NamedTuple):
    """Where the tokens of a model live."""

    model: PreTrainedModel  # that was given, with or without a head
    inner: PreTrainedModel  # the decoder or the vision transformer in it
    module: nn.Module  # whose child they are
    dim: int
    is_vision: bool


def add_register_tokens(
    model: PreTrainedModel, n_tokens: int = 1, *, std: float = STD, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Adds n trainable tokens to the sequences of a decoder or a vision transformer, in place; returns the model.

    In a decoder they stand in front of each row's first token, behind its padding: a trained sink token. Positions of
    the tokens move on by n, logits and hidden states are those of the tokens, and the columns of attention weights
    include ours. The first forward pass puts them into the cache, of which `get_seq_length` goes on counting the
    user's tokens; a StaticCache gets n more slots. In a SinkCache they are the first n of its sinks. In a vision
    transformer they stand between the class token and the patches, and are gone before the final norm.

    A model that was trained without them computes something else from now on: they are to be trained, alone or with
    it. They are in the model's state dict and checkpoints. `from_pretrained` does not know them, and leaves them out
    with a warning: add them again and load the state dict, or use `RegisterTokensConfig`, which saves an adapter.

    Args:
        n_tokens: how many.
        std: of the normal distribution that they start from.
        dtype: of the parameters; the model's own by default.

    Raises:
        ValueError: the model has such tokens already; it is neither a decoder that attends to earlier tokens alone and
            takes embeddings nor a vision transformer with one length of sequence; or an argument is none of these. The
            model is as it was.
        TypeError: an argument of a wrong type.
    """
    check_registers(n_tokens, std)
    home = find_home(model)
    check(home)
    device = next(home.module.parameters()).device
    install(home, RegisterTokens(n_tokens, home.dim, std, device=device, dtype=dtype or model.dtype))
    return model


def remove_register_tokens(model: nn.Module) -> nn.Module:
    """Takes out what `add_register_tokens` has put in, and returns the model.

    Raises:
        ValueError: there is nothing.
    """
    if not any(isinstance(getattr(module, CHILD, None), RegisterTokens) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no register tokens of add_register_tokens")
    uninstall(model)
    return model


def find_home(model: Any) -> Home:
    """Where the tokens of the model will live.

    Raises:
        TypeError: this is no model of transformers.
        ValueError: it has some already, or cannot have any.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is not a model of transformers (a PreTrainedModel)")
    if any(hasattr(module, CHILD) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has register tokens already: remove them first")
    if model.main_input_name == "pixel_values":
        encoder: Any = model if hasattr(model, EMBEDDINGS) else model.base_model
        module = getattr(encoder, EMBEDDINGS, None)
        dim = getattr(encoder.config, "hidden_size", None)
        if not isinstance(module, nn.Module) or not isinstance(dim, int):
            raise ValueError(
                _refusal(model, "it has no `embeddings` of one hidden size, behind which they would stand")
            )
        find_blocks(encoder)
        return Home(model, encoder, module, dim, is_vision=True)
    decoder: Any = decoder_of(model) if model.main_input_name == "input_ids" else None
    takes = set() if decoder is None else set(inspect.signature(decoder.forward).parameters)
    attends = {"inputs_embeds", "attention_mask"} <= takes and keeps_keys(decoder)
    if model.config.is_encoder_decoder or not attends:
        raise ValueError(_refusal(model, "it is neither a decoder with attention nor a vision transformer"))
    return Home(model, decoder, decoder, embeddings_of(decoder).embedding_dim, is_vision=False)


def check(home: Home) -> None:
    """Tries the model with register tokens, and leaves it as it was.

    Where parameters have no values here (on the meta device, or spread by ZeRO-3) it cannot run and says nothing.

    Raises:
        ValueError: it cannot have them.
    """
    if any(param.is_meta or hasattr(param, "ds_id") for param in home.model.parameters()):
        return
    with _undisturbed(home.inner):
        if home.is_vision:
            _check_vision(home)
        else:
            _check_decoder(home)


def install(home: Home, child: nn.Module) -> None:
    """Makes what the child gives, called with a device, the register tokens: embeddings (n, d), or None."""
    home.module.add_module(CHILD, child)
    hooks = hook_vision(home.inner, CHILD) if home.is_vision else hook_decoder(home.inner)
    child.hooks = hooks  # type: ignore[assignment]
    if not home.is_vision:
        vars(home.model)[_MASKS] = masks_later


def uninstall(model: nn.Module) -> None:
    """Undoes `install`."""
    for module in [module for module in model.modules() if hasattr(module, CHILD)]:
        for hook in getattr(module, CHILD).hooks:
            hook.remove()
        delattr(module, CHILD)
        register_decoder.forget(module)
        register_vision.forget(module)
    for module in model.modules():
        if vars(module).get(_MASKS) is masks_later:
            del vars(module)[_MASKS]


class _Trial(nn.Module):
    """Stands for register tokens, without a parameter: those that peft makes for a file have no values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, device: torch.device) -> Tensor:
        return torch.linspace(-1.0, 1.0, self.dim, device=device)[None]


def _check_decoder(home: Home) -> None:
    """Raises ValueError unless the decoder is given embeddings as well as ids, and no token sees a later one."""
    decoder: Any = home.inner
    if getattr(decoder.config, "hidden_size_per_layer_input", None):
        raise ValueError(_refusal(home.model, "it looks up inputs of each layer by token ids, and they have none"))
    ids = torch.tensor([[0, 1, 0]], device=decoder.device)
    embeds = decoder.get_input_embeddings()(ids)
    with _refusing(home.model, "it does not run on embeddings"):
        of_ids, of_embeds = (decoder(**inputs)[0] for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}))
        other = torch.cat([embeds[:, :2], -embeds[:, 2:]], dim=1)
        change = (decoder(inputs_embeds=other)[0] - of_embeds)[0].abs().amax(-1)
    if not torch.allclose(of_ids, of_embeds, rtol=1e-2, atol=1e-3):
        raise ValueError(_refusal(home.model, "embeddings of ids are not all that it makes of ids"))
    if change[0] > _EFFECT * change[2]:
        raise ValueError(_refusal(home.model, "tokens attend to later ones; it is no decoder"))
    if _tried(home, decoder, input_ids=ids).shape != of_ids.shape:
        raise ValueError(_refusal(home.model, "its first output is not one sequence of hidden states"))
    _check_whole(home)


def _check_whole(home: Home) -> None:
    """Raises ValueError unless the decoder takes them in the model around it too, which prepares its inputs."""
    if makes_masks(home.model, home.inner):
        raise ValueError(
            _refusal(home.model, "it makes the masks of its decoder itself, for images that attend in both directions")
        )
    ids = torch.tensor([[0, 1, 0]], device=home.inner.device)
    try:
        _tried(home, home.model, input_ids=ids, attention_mask=torch.ones_like(ids))
    except ValueError:
        if _runs_on_ids(home.model, ids):
            raise


def _runs_on_ids(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether it needs nothing beside token ids, such as images."""
    try:
        model(input_ids=ids)
    except _REFUSALS:
        return False
    return True


def _check_vision(home: Home) -> None:
    """Raises ValueError unless there is an output of the same shape and another content."""
    with _refusing(home.model, "it does not run on an image alone"):
        before: Any = home.inner(**example_of(home.inner))[0]
    if not isinstance(before, Tensor) or before.ndim != 3:
        raise ValueError(_refusal(home.model, "its first output is not one sequence of hidden states"))
    after = _tried(home, home.inner, **example_of(home.inner))
    if after.shape != before.shape or torch.equal(after, before):
        raise ValueError(_refusal(home.model, "its output does not come from its `embeddings` with more tokens"))


def _tried(home: Home, model: Any, **inputs: Any) -> Any:
    """The first output of the model, or of the decoder or vision transformer in it, with a token on trial.

    Raises:
        ValueError: there is none.
    """
    install(home, _Trial(home.dim))
    try:
        with _refusing(home.model, "it does not run with them"):
            return model(**inputs)[0]
    finally:
        uninstall(home.model)


@contextmanager
def _refusing(model: nn.Module, reason: str) -> Iterator[None]:
    """Makes a refusal of what a model may raise that is not made for it."""
    try:
        yield
    except _REFUSALS as error:
        raise ValueError(_refusal(model, f"{reason} ({error})")) from error


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout and gradients; random numbers and modes are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with trial_of(model):
            yield
    finally:
        for module in training:
            module.training = True


def _refusal(model: nn.Module, reason: str) -> str:
    return f"model: {type(model).__name__} cannot have register tokens: {reason}"
