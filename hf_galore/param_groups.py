"""Which parameters of a model are projected, and plain torch parameter groups that say so."""

import ast
import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn

from hf_galore.experts import fused_experts, routers, stores_transposed
from hf_galore.heads import heads
from hf_galore.low_rank_options import LOW_RANK_DEFAULTS
from hf_galore.resume import TARGETS

ALL_LINEAR = "all-linear"
_LIST_FORM = """; a list on a command line is q_proj v_proj, q_proj,v_proj or '["q_proj", "v_proj"]'"""


def galore_param_groups(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    rank: int = 128,
    update_proj_gap: int = LOW_RANK_DEFAULTS["update_proj_gap"],
    scale: float = LOW_RANK_DEFAULTS["scale"],
    proj_type: str = LOW_RANK_DEFAULTS["proj_type"],
    *,
    weight_decay: float | None = None,
    decay_parameters: Collection[str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups that project the matrices of `target_modules` and train everything else at full rank.

    Targets are the weights of nn.Linear and GPT-2's Conv1D, and fused expert weights (E, m, n), which are parameters
    of their module. Frozen parameters are in no group, tied ones in one. Factors of a PEFT adapter (`lora_A`, …) are
    targets only if `target_modules` names them.

    Args:
        target_modules: "all-linear" (all targets but output heads, classification heads, routers and embeddings); or
            a regular expression that matches whole names, or a part of a name; or a list of those, also as a text in
            JSON or with commas. Names are those of `model.named_modules()`, and of `model.named_parameters()` for
            fused experts.
        rank, update_proj_gap, scale, proj_type: the group keys of the projected matrices.
        weight_decay: given to the groups; parameters not in `decay_parameters` get 0. None leaves the optimizer's own.
        decay_parameters: names of the parameters that decay; None means all with two dimensions or more.
        options: further keys of the projected groups (`subspace`, …).

    Returns:
        The groups that are not empty: not projected (decayed, not decayed), then projected (decayed, not decayed),
        then those projected whose weights are stored transposed.

    Raises:
        ValueError: nothing to train at low rank, or a name that matches nothing (with the nearest names).
        TypeError: `target_modules` is neither a string nor a list of strings.
    """
    targets = find_targets(model, target_modules)
    low_rank = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, **options}
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    warn_of_a_small_share(model, targets, target_modules)
    kinds = [({}, [name for name in trainable if name not in targets]), *low_rank_kinds(model, low_rank, targets)]
    return group_parameters(model, kinds, weight_decay, decay_parameters)


def low_rank_kinds(
    model: nn.Module, low_rank: dict[str, Any], targets: Collection[str]
) -> list[tuple[dict[str, Any], Collection[str]]]:
    """The targets, by name, with the keys of their groups: those that are stored transposed say so there."""
    holders = dict(model.named_modules())
    transposed = {name for name in targets if _is_transposed(holders[name.rpartition(".")[0]])}
    return [(low_rank, set(targets) - transposed), ({**low_rank, "transposed": True}, transposed)]


def _is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weights as (…, in_features, out_features)."""
    return is_conv1d(module) or (not isinstance(module, nn.Linear) and stores_transposed(module))


def warn_of_a_small_share(model: nn.Module, targets: Collection[str], target_modules: str | Sequence[str]) -> None:
    """Warns where less than a tenth of what trains is projected."""
    trainable = {n: param for n, param in model.named_parameters() if param.requires_grad or n in targets}
    sizes = {name: _elements(param) for name, param in trainable.items()}
    share = sum(sizes[name] for name in trainable if name in targets) / sum(sizes.values())
    if share < 0.1:
        warnings.warn(
            f"only {share:.1%} of the trainable parameters are projected (target_modules={target_modules!r}): "
            "the rest has the memory of full-rank training",
            stacklevel=3,
        )


def _elements(param: nn.Parameter) -> int:
    """How many weights a parameter holds: bitsandbytes packs two 4-bit codes into an element."""
    state = getattr(param, "quant_state", None)
    return param.numel() if state is None else state.shape.numel()


def group_parameters(
    model: nn.Module,
    kinds: Sequence[tuple[dict[str, Any], Collection[str]]],
    weight_decay: float | None,
    decay_parameters: Collection[str] | None,
) -> list[dict[str, Any]]:
    """Groups of the named parameters: for each (keys, names) one that decays and one that does not, if not empty.

    Those with `rank` have the names of their parameters as `targets`.
    """
    groups = []
    for keys, names in kinds:
        wanted = set(names)
        members = [(name, param) for name, param in model.named_parameters() if name in wanted]
        for decays in (True, False):
            chosen = [(name, param) for name, param in members if _decays(name, param, decay_parameters) is decays]
            if chosen:
                group: dict[str, Any] = {"params": [param for _, param in chosen], **keys}
                if "rank" in keys:  # a run that goes on asks whether they are still the same
                    group[TARGETS] = [name for name, _ in chosen]
                if weight_decay is not None:
                    group["weight_decay"] = weight_decay if decays else 0.0
                groups.append(group)
    return groups


def _decays(name: str, param: nn.Parameter, decay_parameters: Collection[str] | None) -> bool:
    return param.dim() >= 2 if decay_parameters is None else name in decay_parameters


def find_targets(
    model: nn.Module, target_modules: str | Sequence[str], quantized: Callable[[nn.Module], bool] | None = None
) -> set[str]:
    """Names (as in `model.named_parameters()`) of the trainable parameters that `target_modules` asks to project.

    Args:
        quantized: says of which modules the quantized weight is a target as well. torch cannot mark codes as
            trainable; they count as frozen where the model has adapters, which train in their place.

    Raises:
        ValueError, TypeError: as `galore_param_groups`.
    """
    canonical = {id(param): name for name, param in model.named_parameters()}
    adapters = _adapter_prefixes(model)
    trained_codes = set()
    if quantized is not None and not adapters:
        trained_codes = {id(module.weight) for module in model.modules() if quantized(module)}
    candidates = list(_candidates(model, trained_codes))
    patterns = _as_list(target_modules, [path for path, _ in candidates])
    if is_all_linear(target_modules):
        left_out = _left_out_of_all_linear(model)
        chosen = [(path, param) for path, param in candidates if id(param) not in left_out]
    else:
        for pattern in patterns:
            if not any(matches(pattern, path) for path, _ in candidates):
                raise ValueError(_nothing_matches(pattern, model, [path for path, _ in candidates]))
        chosen = [(path, param) for path, param in candidates if any(matches(p, path) for p in patterns)]

    named = {prefix for prefix in adapters if any(_stem(prefix) in pattern for pattern in patterns)}
    targets = {
        canonical[id(param)]
        for path, param in chosen
        if (param.requires_grad or id(param) in trained_codes) and not _inside(path, adapters - named)
    }
    if not targets:
        raise ValueError(
            f"target_modules={target_modules!r} leaves 0 parameters to project: of the {len(chosen)} weights it names "
            "every one is frozen, quantized or a factor of a PEFT adapter. Unfreeze the model, or name other modules"
        )
    return targets


def _stem(prefix: str) -> str:
    """What names an adapter part in a pattern: `lora` for `….q_proj.lora_A`."""
    leaf = prefix.rsplit(".", 1)[-1]
    return leaf.rpartition("_")[0] or leaf


def is_all_linear(target_modules: str | Sequence[str]) -> bool:
    """Whether this asks for all linear layers."""
    patterns = _as_list(target_modules, ())
    return len(patterns) == 1 and patterns[0].lower().replace("_", "-") == ALL_LINEAR


def _as_list(target_modules: str | Sequence[str], paths: Collection[str]) -> list[str]:
    """The patterns that are asked for; `paths` is what there is to match.

    Raises:
        ValueError, TypeError: as `galore_param_groups`.
    """
    given = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(p, str) for p in given):
        raise TypeError(
            f"target_modules={target_modules!r} must be 'all-linear', a regular expression or part of a module name, "
            "or a list of those"
        )
    patterns = [pattern for text in given for pattern in _read(text, paths)]
    if not patterns or not all(patterns):
        raise ValueError(f"target_modules={target_modules!r} names no modules: pass 'all-linear' or module names")
    return patterns


def _read(text: str, paths: Collection[str]) -> list[str]:
    """The patterns in a text from a command line or a file: itself, or a list that is written as one.

    A JSON or Python list of strings is one. Otherwise commas and spaces divide a text that is no pattern for anything,
    if every part is a plain name or a pattern for something: `q_proj,v_proj` is a list and `a{1,2}` is not.
    """
    listed = _literal_list(text)
    if listed is not None:
        return listed
    if _matches_any(text, paths):
        return [text]
    parts = [part for part in (part.strip("[]\"'") for part in re.split(r"[,\s]+", text)) if part]
    is_list = all(re.fullmatch(r"[\w.-]+", part) or _matches_any(part, paths) for part in parts)
    return parts if parts and is_list else [text]


def _literal_list(text: str) -> list[str] | None:
    try:
        value = ast.literal_eval(text.strip()) if text.lstrip().startswith("[") else None
    except (SyntaxError, ValueError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(part, str) for part in value) else None


def _matches_any(pattern: str, paths: Collection[str]) -> bool:
    try:
        return any(matches(pattern, path) for path in paths)
    except ValueError:  # no regular expression
        return False


def _candidates(model: nn.Module, trained_codes: Collection[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, parameter) of every matrix that can be projected: module paths; parameter paths for fused experts.

    Quantized weights are among them if their ids are in `trained_codes`.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) or is_conv1d(module):
            if isinstance(weight, nn.Parameter) and (weight.is_floating_point() or id(weight) in trained_codes):
                yield path, weight
        else:
            for name, param in fused_experts(module).items():
                yield f"{path}.{name}" if path else name, param


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer whose weight is stored as (in_features, out_features)."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern is a part of the path, or a regular expression for the whole of it."""
    if pattern in path:
        return True
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"target_modules: {pattern!r} is no valid regular expression ({error})") from error


def _inside(path: str, prefixes: Collection[str]) -> bool:
    """Whether the path is one of the prefixes or lies below one."""
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def all_linear(model: nn.Module) -> set[str]:
    """Paths of the layers, trainable or not, that "all-linear" stands for."""
    left_out = _left_out_of_all_linear(model)
    return {
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and id(module.weight) not in left_out
    }


def _left_out_of_all_linear(model: nn.Module) -> set[int]:
    """The ids of the parameters that "all-linear" leaves out: those of heads, routers and embeddings (tied or not)."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(param) for part in (*heads(model), *routers(model), *embeddings) for param in part.parameters()}


def _adapter_prefixes(model: nn.Module) -> set[str]:
    """Paths of the adapter parts (`….lora_A`, …) of a PEFT model: what its layers list in `adapter_layer_names`.

    `modules_to_save` is no adapter part: it holds whole trained copies of modules.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, "adapter_layer_names", ())
        if name != "modules_to_save" and isinstance(getattr(module, name, None), nn.ModuleDict)
    }


def _nothing_matches(pattern: str, model: nn.Module, paths: list[str]) -> str:
    """The error text for a pattern without a match: what it hit that cannot be projected, or the nearest names."""
    unfit = [path for path, _ in model.named_modules() if path and matches(pattern, path)]
    if unfit:
        return (
            f"target_modules: {pattern!r} matches only modules without a matrix that can be projected (such as "
            f"{unfit[0]!r}); targets are nn.Linear, Conv1D and fused expert weights"
        )
    form = _LIST_FORM if set(pattern) & set(", []") else ""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, n=5, cutoff=0.3) or leaves[:10]
    return f"target_modules: {pattern!r} matches no module; near matches: {', '.join(near) or 'none'}{form}"
