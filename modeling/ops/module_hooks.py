"""Whether a module may be replaced by a function of its weights: only if nobody would notice."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own are attached to this very module."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)
