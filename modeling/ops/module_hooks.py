"""Whether a module may be replaced by a function of its weights: only if nobody would notice."""

from torch import nn


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a product with `module.weight` is all that the module does. PEFT's fully trained copies are: theirs is
    the weight of the copy."""
    kind = type(module)
    plain = kind is nn.Linear or kind.__name__ == "ModulesToSaveWrapper"
    return plain and getattr(module, "bias", None) is None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own are attached to this very module."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)
