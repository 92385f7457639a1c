"""Parallel plan: which parameters are cut over which mesh dimension, said by name patterns.

A pattern is a parameter name in which `*` stands for one component (a layer's number). A pattern that fits no parameter
is an error: a plan that silently leaves the experts whole trains, slowly, until memory runs out.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.distributed.tensor import Shard


def _compile(pattern: str) -> re.Pattern[str]:
    """Regular expression for a pattern; a name may carry what adapters add: a prefix (`base_model.model.`), and
    `base_layer` where a module with adapters wraps the one that holds the parameter."""
    module, _, parameter = re.escape(pattern).replace(r"\*", r"[^.]+").rpartition(r"\.")
    return re.compile(rf"(?:.*\.)?{module}(?:\.base_layer)*\.{parameter}" if module else rf"(?:.*\.)?{parameter}")


@dataclass(frozen=True)
class ParallelPlan:
    """`extra_parallel_plan`: mesh dimension ("ep") -> {name pattern: Shard(dim)}."""

    extra_parallel_plan: Mapping[str, Mapping[str, Shard]] = field(default_factory=dict)

    def resolve(self, mesh_dim: str, names: Iterable[str]) -> dict[str, Shard]:
        """The parameters that `mesh_dim` cuts: full name -> Shard.

        Raises:
            ValueError: a pattern matches none of `names`, or two patterns match one name with different placements.
        """
        names = list(names)
        placements: dict[str, Shard] = {}
        for pattern, placement in self.extra_parallel_plan.get(mesh_dim, {}).items():
            expression = _compile(pattern)
            matched = [name for name in names if expression.fullmatch(name)]
            if not matched:
                raise ValueError(
                    f"The {mesh_dim!r} plan's pattern {pattern!r} matches none of the {len(names)} parameter names "
                    f"(for example {names[0] if names else 'none'!r}); correct the pattern or the model it is for."
                )
            for name in matched:
                if placements.setdefault(name, placement) != placement:
                    raise ValueError(
                        f"{name} is placed twice by the {mesh_dim!r} plan: {placements[name]} and {placement} "
                        f"({pattern!r})."
                    )
        return placements
