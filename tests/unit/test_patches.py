"""Every patch that the architecture names exists once in the code, and the README's table lists the same ones."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATCHES = {
    "fsdp-dummy-vit",
    "encoder-data-balance",
    "sp-local-positions",
    "vit-sp-pos-embed",
    "vit-sp-rotary-length",
    "vit-sp-rotary-slice",
    "vit-sp-cu-seqlens",
    "vit-max-seqlen",
    "npu-cu-seqlens",
    "vit-fused-block",
    "lm-flash-kwargs",
    "vit-lm-fill-back",
    "deepstack-sp",
    "ep-fused-moe",
    "veomni-position-ids",
    "veomni-position-id-func",
    "veomni-registry",
}


def test_code_and_readme_list_the_same_patches() -> None:
    found = []
    for path in (ROOT / "modeling").rglob("*.py"):
        found += re.findall(r"^\s*# PATCH\(([\w-]+)\): \w", path.read_text(), flags=re.MULTILINE)
    assert sorted(found) == sorted(PATCHES), "each patch once"
    table = re.findall(r"^\| ([\w-]+) \| `", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(table) >= PATCHES, PATCHES - set(table)


def test_the_table_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and "test_" in line]
    for row in rows:
        for name in re.findall(r"`((?:unit|parity|distributed|conversion)/test_\w+\.py)`", row):
            assert (ROOT / "tests" / name).exists(), name
