"""The key-value cache by both its names: transformers says past_key_values up to release 5.23, and cache after it."""

import dataclasses

from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(MoeModelOutputWithPast)} else "past_key_values"
)
"""Its name in the installed transformers: of arguments, and of the field of a model's output."""


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that a caller passed by either name.

    Raises: ValueError for two different ones.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values are two names of one argument; got two caches, pass one.")
    return past_key_values if cache is None else cache
