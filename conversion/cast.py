"""Casts between the floating-point dtypes of checkpoints. numpy has no bfloat16: it travels as its 16 bits."""

import numpy as np

_STORAGE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NATIVE = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def storage_dtype(dtype: str) -> np.dtype:
    """The unsigned integers that carry a safetensors dtype's bits."""
    from conversion.shard_io import DTYPE_BYTES

    return np.dtype(_STORAGE[DTYPE_BYTES[dtype]])


def cast(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """`bits` of dtype `source` as bits of dtype `target`, rounded to nearest even; overflow gives infinity."""
    if source == target:
        return bits
    with np.errstate(over="ignore", invalid="ignore"):
        values = _bfloat16_to_float32(bits) if source == "BF16" else bits.view(_NATIVE[source])
        if target == "BF16":
            return _float32_to_bfloat16(values.astype(np.float32))
        return values.astype(_NATIVE[target]).view(storage_dtype(target))


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even on the upper 16 bits; a NaN keeps its sign and becomes quiet."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
