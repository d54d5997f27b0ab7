"""What `fully_shard` knows of a model's parameters: the one place that reaches into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

#: A module that had a parameter, the module that has it now, and its name there.
Move = tuple[nn.Module, nn.Module, str]


def hand_over(model: nn.Module, moves: Iterable[Move], dropped: Iterable[nn.Module]) -> None:
    """Tell `fully_shard` that parameters have moved to other modules, or have gone.

    It puts a whole parameter into its module for each pass, and knows that module from when the
    model was sharded. When a parametrization is removed the weight goes back to its layer.

    Args:
        dropped: modules whose parameters the model has no longer.

    Raises:
        RuntimeError: this version of torch keeps its lists elsewhere.
    """
    now = {id(old): (new, leaf) for old, new, leaf in moves}
    gone = {id(module) for module in dropped}
    for group in _groups(model):
        for param in list(group.fsdp_params):
            info = param._module_info
            if id(info.module) in gone:
                group.fsdp_params.remove(param)
            elif id(info.module) in now:
                info.module, info.param_name = now[id(info.module)]
                others = zip(info.shared_modules, info.shared_param_names, strict=True)
                places = [now.get(id(module), (module, leaf)) for module, leaf in others]
                info.shared_modules = [module for module, _ in places]
                info.shared_param_names = [leaf for _, leaf in places]


def remove_parametrization(module: nn.Module, leaf: str) -> None:
    """As torch's function, also for a module whose class `fully_shard` has extended."""
    from torch.distributed.fsdp import FSDPModule

    extended = type(module)
    if FSDPModule not in extended.__bases__:
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        return
    # torch looks for the parametrization in the class itself, which is the other base here.
    (parametrized,) = (base for base in extended.__bases__ if base is not FSDPModule)
    module.__class__ = parametrized
    try:
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    finally:
        plain = type(module)
        own = {key: value for key, value in vars(extended).items() if key == "__deepcopy__"}
        module.__class__ = type(f"FSDP{plain.__name__}", (FSDPModule, plain), own)


def _groups(model: nn.Module) -> Iterator[Any]:
    """The lists of sharded parameters in a model."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        known = [n for n in ("_fsdp_param_groups", "_fsdp_param_group") if hasattr(state, n)]
        if not known:
            raise RuntimeError(
                "the weights are final, but this version of torch does not show where fully_shard "
                "keeps its parameters: gather the model with get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) and load it into a plain one"
            )
        found = getattr(state, known[0])
        yield from found if isinstance(found, list) else [found] if found is not None else []
