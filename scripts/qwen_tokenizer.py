"""Qwen's real tokenizer from `qwen.tiktoken`, the vocabulary file that the `dashscope` wheel ships.

A tiktoken file holds ranks only: each token's bytes and the order in which it was merged. A `tokenizers` BPE also
needs, for each token, the pair it was merged from. That pair is found by running BPE on the token's bytes with the
merges of lower rank alone: what is left, two pieces, is the pair.
"""

import base64
import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

# The pattern Qwen2, 2.5 and 3 split text with before BPE; tiktoken's Qwen encoding states the same.
PRETOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BASE_VOCAB_SIZE = 151_643

# In order of id, from BASE_VOCAB_SIZE on: the published ids of Qwen3-VL. skip_special_tokens drops the first group.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def find_qwen_tiktoken() -> Path:
    """Path of `qwen.tiktoken` in the installed `dashscope`, found without importing that package.

    Raises:
        ValueError: dashscope is not installed, or its wheel no longer carries the file.
    """
    try:
        files = importlib.metadata.files("dashscope") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "dashscope is not installed, and Qwen's vocabulary is read from it: pip install dashscope"
        ) from error
    for file in files:
        if file.name == "qwen.tiktoken":
            return Path(str(file.locate()))
    raise ValueError(
        f"dashscope {importlib.metadata.version('dashscope')} holds no qwen.tiktoken, 2.0.2 does: install that one"
    )


def load_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, which is also the id. One line of the file is `base64(token) rank`."""
    lines = path.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    if len(ranks) != BASE_VOCAB_SIZE or sorted(ranks.values()) != list(range(BASE_VOCAB_SIZE)):
        raise ValueError(f"{path} holds {len(ranks)} tokens, expected {BASE_VOCAB_SIZE} with ids 0, 1, 2, …")
    return ranks


def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest count up from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    unprintable = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + offset) for offset, byte in enumerate(unprintable)})
    return table


def merged_from(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair of tokens that the merge with this token's rank joins."""
    rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        best = min(pair_ranks)
        if best >= rank:
            break
        at = pair_ranks.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise ValueError(
            f"token {rank} ({token!r}) cannot be reached by merges: {len(parts)} parts are left, expected 2"
        )
    return parts[0], parts[1]


def build_qwen_tokenizer() -> Tokenizer:
    """Qwen3-VL's fast tokenizer: NFC, Qwen2's split pattern, byte-level BPE, 26 added tokens at their published ids."""
    ranks = load_ranks(find_qwen_tiktoken())
    printable = byte_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    ordered = sorted(ranks, key=ranks.__getitem__)
    vocab = {spell(token): ranks[token] for token in ordered}
    pairs = (merged_from(token, ranks) for token in ordered if len(token) > 1)
    merges = [(spell(left), spell(right)) for left, right in pairs]

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Contents of `tokenizer_config.json`, as Qwen3-VL publishes it (the chat template lies in its own file)."""
    names = [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(BASE_VOCAB_SIZE + i): {"content": name, **flags, "special": name in SPECIAL_TOKENS}
            for i, name in enumerate(names)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def save_qwen_tokenizer(folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt: the files Qwen3-VL is published with."""
    tokenizer = build_qwen_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    config = json.dumps(tokenizer_config(max_length), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
