"""Hooks on the attention of transformers' models: what stands between queries, keys, values and their result.

Every model asks `AttentionInterface.get_interface` for its attention function, at every call. `register` wraps what
that returns, the model's own eager function and the entries of the registry alike. Modules with hooks run these;
for all others the function is called with what it was given. The registry itself stays as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

_HOOKS = "_hf_galore_attention_hooks"
_GET = "get_interface"
_original: list[Callable[..., Any]] = []


class AttentionCall(NamedTuple):
    """One call of an attention function: queries (B, H, Q, d), keys (B, G, K, d), values (B, G, K, e).

    `mask` is what the implementation is given: None, (B, 1, Q, K), two-dimensional for flash attention, a BlockMask
    for flex attention. `options` are all other arguments, by name.
    """

    module: nn.Module
    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]


Result = tuple[Tensor, Any]  # (B, Q, H, e), and the attention's weights (B, H, Q, K) or what it gives in their place
Attention = Callable[[AttentionCall], Result]
Hook = Callable[[AttentionCall, Attention], Result]


def register() -> None:
    """Makes hooks run. Idempotent; see `unregister`."""
    if not _original:
        _original.append(vars(AttentionInterface)[_GET])
        setattr(AttentionInterface, _GET, _get_interface)


def unregister() -> None:
    """Restores transformers exactly as it was before `register`; hooks that are on modules do nothing from then on."""
    if _original:
        setattr(AttentionInterface, _GET, _original.pop())


def is_registered() -> bool:
    """Whether hooks run."""
    return bool(_original)


def add_hook(module: nn.Module, hook: Hook) -> None:
    """Puts the hook, a function of a module, around the attention of this one and around its earlier hooks."""
    setattr(module, _HOOKS, (*getattr(module, _HOOKS, ()), hook))


def remove_hook(module: nn.Module, hook: Hook) -> None:
    """Takes the hook off, or what equals it: a bound method is another object wherever it is written.

    The attribute goes with the last of them.

    Raises:
        ValueError: the module has no such hook.
    """
    hooks = getattr(module, _HOOKS, ())
    if hook not in hooks:
        raise ValueError(f"the hook {hook!r} is not on this {type(module).__name__}")
    left = tuple(other for other in hooks if other != hook)
    if left:
        setattr(module, _HOOKS, left)
    else:
        delattr(module, _HOOKS)


def _get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    """transformers' method; the function that it returns runs the hooks of the module that it is called for."""
    return partial(_attend, _original[0](self, attn_implementation, default), attn_implementation)


def _attend(function: Callable[..., Any], implementation: str, module: nn.Module, *args: Any, **options: Any) -> Any:
    hooks = getattr(module, _HOOKS, ())
    if not hooks:
        return function(module, *args, **options)
    attention: Attention = partial(_call, function)
    for hook in hooks:
        attention = partial(_run, hook, attention)
    return attention(_bound(module, implementation, *args, **options))


def _bound(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> AttentionCall:
    return AttentionCall(module, implementation, query, key, value, attention_mask, options)


def _run(hook: Hook, attention: Attention, call: AttentionCall) -> Result:
    return hook(call, attention)


def _call(function: Callable[..., Any], call: AttentionCall) -> Result:
    """The attention function itself."""
    result: Result = function(call.module, call.query, call.key, call.value, call.mask, **call.options)
    return result
