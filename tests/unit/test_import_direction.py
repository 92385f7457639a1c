"""Imports point one way: ops, distributed <- data <- qwen3_vl_moe <- registry; conversion stands beside them.

Read from the source with `ast`, imports inside functions and under TYPE_CHECKING included, so nothing needs to be
importable for this test, and a lazy import is no way around it.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST_PARTY = {"modeling", "conversion", "scripts", "tests"}

# Module prefix -> first-party prefixes it may import. The longest prefix that matches a module decides.
ALLOWED: dict[str, tuple[str, ...]] = {
    "modeling.ops": ("modeling.ops", "modeling.distributed"),
    "modeling.distributed": ("modeling.distributed", "conversion"),
    "modeling.data": ("modeling.data", "modeling.ops", "modeling.distributed"),
    "modeling.qwen3_vl_moe": (
        "modeling.qwen3_vl_moe",
        "modeling.data",
        "modeling.ops",
        "modeling.distributed",
        "conversion",
    ),
    "modeling.training": (
        "modeling.training",
        "modeling.qwen3_vl_moe",
        "modeling.data",
        "modeling.ops",
        "modeling.distributed",
        "conversion",
    ),
    "modeling.registry": ("modeling",),
    "modeling": (),
    "conversion": ("conversion", "modeling.qwen3_vl_moe.parallel_plan"),
    "scripts": ("modeling", "conversion", "scripts"),
    "tests": ("modeling", "conversion", "scripts", "tests"),
}
CONVERTER_PACKAGES = {"torch", "safetensors", "numpy", "huggingface_hub", "tqdm"}
# Fast paths that the converter does without where they are not installed, each behind one module.
OPTIONAL_PACKAGES = {"conversion.hashing": {"xxhash"}, "conversion.transpose_simd": {"numba", "llvmlite"}}
# Of transformers' Qwen3-VL only what describes it may be used, never what computes it.
UPSTREAM_IMPLEMENTATION = re.compile(
    r"transformers\.(models\.\w+\.modeling_qwen|Qwen(?!\w*(Config|Processor|Tokenizer|TokenizerFast)$))"
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names this source imports; `from a import b` counts as `a.b`, which may be a module or a name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                anchor = package[: len(package) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def allowed_for(module: str) -> tuple[str, ...]:
    rules = [prefix for prefix in ALLOWED if within(module, prefix)]
    return ALLOWED[max(rules, key=len)]


def violations(source: str, module: str, is_package: bool) -> list[str]:
    """What `module` imports against the rules, as readable lines."""
    found = []
    for name in sorted(imported_modules(source, module, is_package)):
        top = name.split(".")[0]
        if top in FIRST_PARTY and not any(within(name, prefix) for prefix in allowed_for(module)):
            found.append(f"{module} imports {name}; it may import {allowed_for(module) or 'nothing of this project'}")
    return found


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_there_is_something_to_check() -> None:
    modules = {module_name(path) for path in source_files("modeling", "conversion")}
    assert {"modeling.ops.attention", "modeling.distributed.parallel_state", "conversion.layout"} <= modules


@pytest.mark.parametrize("path", source_files("modeling", "conversion", "scripts", "tests"), ids=module_name)
def test_imports_follow_the_direction(path: Path) -> None:
    module = module_name(path)
    assert not violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


@pytest.mark.parametrize("path", source_files("modeling"), ids=module_name)
def test_nothing_comes_from_upstreams_modeling_file(path: Path) -> None:
    imports = imported_modules(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not [name for name in imports if UPSTREAM_IMPLEMENTATION.match(name)]


@pytest.mark.parametrize("path", source_files("conversion"), ids=module_name)
def test_converter_needs_no_more_than_torch_and_safetensors(path: Path) -> None:
    module = module_name(path)
    imports = imported_modules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    foreign = {name.split(".")[0] for name in imports} - FIRST_PARTY - set(sys.stdlib_module_names)
    assert not foreign - CONVERTER_PACKAGES - OPTIONAL_PACKAGES.get(module, set())


def test_rules_catch_what_they_forbid() -> None:
    cases = {
        "modeling.ops.x": "def f():\n    from modeling.qwen3_vl_moe import position_ids\n",
        "modeling.distributed.x": "from ..data import collator\n",
        "modeling.data.x": "import modeling.registry\n",
        "modeling.qwen3_vl_moe.x": "from modeling import registry\n",
        "conversion.x": "from modeling.qwen3_vl_moe import modeling_qwen3_vl_moe\n",
        "modeling.ops.y": "from scripts.train import main\n",
    }
    for module, source in cases.items():
        assert len(violations(source, module, is_package=False)) == 1, module
    assert UPSTREAM_IMPLEMENTATION.match("transformers.Qwen3VLMoeForConditionalGeneration")
    assert UPSTREAM_IMPLEMENTATION.match("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeModel")
    assert not UPSTREAM_IMPLEMENTATION.match("transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe")
    assert not UPSTREAM_IMPLEMENTATION.match("transformers.Qwen3VLMoeConfig")
    assert not violations("from . import rotary\nimport torch\n", "modeling.ops.x", is_package=False)
