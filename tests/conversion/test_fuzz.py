"""Mutated headers, indexes and configs: always a clean error or a whole output, never a traceback, a hang, or memory.

500 cases run by default; the long run is

    pytest tests/conversion/test_fuzz.py -m fuzz
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion import hf_to_veomni, verify
from conversion.budget import peak_bytes
from conversion.checkpoint import MANIFEST
from tests.conversion.synthetic import toy_config, write_checkpoint

# What a case may add to the process's peak; a header of 16 MB, the largest allowed, is not among the cases.
MEMORY_BYTES = 128 * 2**20

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from(["BF16", "F32", "I64", "hub", "fused", "ep-sharded", "qwen3_vl_moe"]),
    st.sampled_from(["", "\ud800", "\0", "../x", "/"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def paths_in(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [prefix]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        found += paths_in(inner, (*prefix, key))
    return found


@st.composite
def mutated_json(draw: Callable[..., Any], original: Any) -> Any:
    """`original` with one to three places replaced, removed, renamed, or copied over each other."""
    content = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in paths_in(content) if place]
        if not places:
            return draw(values)
        place = draw(st.sampled_from(places))
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "rename", "nudge", "copy"]))
        old = parent[place[-1]]
        if how == "remove":
            del parent[place[-1]]
        elif how == "rename" and isinstance(parent, dict):
            renamed = draw(st.text(max_size=12) | st.sampled_from(list(parent)))
            parent[renamed] = parent.pop(place[-1])
        elif how == "nudge" and type(old) is int:
            parent[place[-1]] = old + draw(st.sampled_from([-8, -2, -1, 1, 2, 8, 2**40]))
        elif how == "copy":
            other = draw(st.sampled_from([p for p in paths_in(content) if p]))
            source = content
            for key in other:
                source = source[key]
            parent[place[-1]] = json.loads(json.dumps(source))
        else:
            parent[place[-1]] = draw(values)
    return content


@st.composite
def mutated_bytes(draw: Callable[..., Any], original: bytes) -> bytes:
    """`original` with bytes changed, cut out or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["change", "cut", "insert", "truncate"]))
        if how == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif how == "truncate":
            del data[place:]
    return bytes(data)


def split_shard(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_shard(header: Any, data: bytes) -> bytes:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def cases(original: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """(file, new content): one file of the checkpoint, mutated as JSON or as bytes."""
    choices = []
    for name, content in original.items():
        if name.endswith(".safetensors"):
            header, data = split_shard(content)
            head = content[: len(content) - len(data)].rstrip()
            choices.append(mutated_json(header).map(lambda h, n=name, d=data: (n, join_shard(h, d))))
            choices.append(mutated_bytes(head).map(lambda h, n=name, d=data: (n, h + d)))
        elif name.endswith(".json"):
            parsed = json.loads(content)
            choices.append(
                mutated_json(parsed).map(lambda c, n=name: (n, json.dumps(c).encode("utf-8", "surrogatepass")))
            )
            choices.append(mutated_bytes(content).map(lambda b, n=name: (n, b)))
    return st.one_of(choices)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    """Small converted checkpoints, the files of each: shards, index, config and manifest."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = toy_config(hidden_size=8, intermediate_size=6, moe_intermediate_size=3, num_experts=2, vocab_size=10,
                        num_hidden_layers=2, mlp_only_layers=[], num_attention_heads=2, head_dim=4)  # fmt: skip
    config["vision_config"] |= {"depth": 1, "hidden_size": 4, "intermediate_size": 5, "num_position_embeddings": 4,
                                "patch_size": 2, "deepstack_visual_indexes": [0]}  # fmt: skip
    write_checkpoint(folder / "in", "hub", config)
    words = {"fused": ["--max-shard-size", "4KB"], "ep-sharded": ["--target", "ep-sharded", "--ep-size", "2"]}
    files = {}
    for name, options in words.items():
        assert hf_to_veomni.main([str(folder / "in"), str(folder / name), "--quiet", *options]) == 0
        files[name] = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        assert sum(file.endswith(".safetensors") for file in files[name]) >= 2
    return folder, files


def check_case(folder: Path, files: dict[str, bytes], name: str, content: bytes) -> None:
    source, output = folder / "case", folder / "out"
    for path in (source, output):
        shutil.rmtree(path, ignore_errors=True)
    source.mkdir()
    for file, data in (files | {name: content}).items():
        (source / file).write_bytes(data)
    peak = peak_bytes()
    words = [str(source), str(output), "--quiet", "--target", "ep-sharded", "--ep-size", "2", "--keep-unknown"]
    for command, arguments in ((hf_to_veomni, words), (verify, ["--hashes", str(source), "--quiet"])):
        errors, printed = io.StringIO(), io.StringIO()
        with redirect_stderr(errors), redirect_stdout(printed):
            code = command.main(arguments)
        assert printed.getvalue() == ""
        if code:
            assert code in (1, 2, 3) and errors.getvalue().startswith("error: ")
        if command is hf_to_veomni:
            assert (output / MANIFEST).exists() == (code == 0) and output.exists() == (code == 0)
    grown = peak_bytes() - peak
    assert grown < MEMORY_BYTES, f"{grown} bytes more"


def fuzz(checkpoints: tuple[Path, dict[str, dict[str, bytes]]], count: int) -> None:
    folder, files = checkpoints
    of_each = [cases(content).map(lambda case, n=name: (n, *case)) for name, content in files.items()]

    # A case takes milliseconds; ten seconds is a hang.
    @settings(max_examples=count, deadline=10_000, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=st.one_of(of_each))
    def run(case: tuple[str, str, bytes]) -> None:
        check_case(folder, files[case[0]], *case[1:])

    run()


def test_fuzz(checkpoints):
    fuzz(checkpoints, 500)


@pytest.mark.fuzz
def test_fuzz_long(checkpoints):
    fuzz(checkpoints, 20_000)
