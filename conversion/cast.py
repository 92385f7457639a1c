"""Casts between the floating-point dtypes of checkpoints, and the search for values that are not finite.

numpy has no bfloat16, so all dtypes travel as the unsigned integers that carry their bits.
"""

from dataclasses import dataclass

import numpy as np

from conversion.shard_io import DTYPE_BYTES

_STORAGE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NATIVE = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# The bits of +infinity: all ones in the exponent. A greater magnitude is a NaN.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
FLOATS = frozenset(_INFINITY)
# Values per step: temporaries stay in the L2 cache, and in no one's memory budget.
_CHUNK = 32 * 1024


@dataclass(frozen=True, slots=True)
class Findings:
    """Counts over a tensor: NaN and infinite values in the source, finite ones that became infinite by the cast.

    `first` is the flat index of the first of them in the output tensor, None where there is none.
    """

    nan: int = 0
    inf: int = 0
    overflow: int = 0
    first: int | None = None

    def merged(self, other: "Findings", offset: int) -> "Findings":
        """Both, where `other` is of the values from flat index `offset` on, after those of `self`."""
        first = self.first
        if first is None and other.first is not None:
            first = other.first + offset
        return Findings(self.nan + other.nan, self.inf + other.inf, self.overflow + other.overflow, first)


NOTHING = Findings()


def storage_dtype(dtype: str) -> np.dtype:
    """The unsigned integers that carry a safetensors dtype's bits."""
    return np.dtype(_STORAGE[DTYPE_BYTES[dtype]])


def cast_into(out: np.ndarray, bits: np.ndarray, source: str, target: str) -> None:
    """Fill `out` with `bits`, both flat, cast from `source` to `target`: to nearest even, overflow to infinity."""
    for start in range(0, bits.size, _CHUNK):
        out[start : start + _CHUNK] = cast(bits[start : start + _CHUNK], source, target)


def cast(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """`bits` of dtype `source` as bits of dtype `target`."""
    if source == target:
        return bits
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        values = _bfloat16_to_float32(bits) if source == "BF16" else bits.view(_NATIVE[source])
        if target == "BF16":
            return _float32_to_bfloat16(values.astype(np.float32))
        return values.astype(_NATIVE[target]).view(storage_dtype(target))


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even on the upper 16 bits; a NaN keeps its sign and becomes quiet."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    nan = np.isnan(values)
    if nan.any():  # rounding would carry some of them into infinity or zero
        rounded[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)
    return rounded.astype(np.uint16)


def find_non_finite(bits: np.ndarray, dtype: str) -> Findings:
    """NaN and infinite values among flat `bits` of a floating-point dtype; nothing for other dtypes."""
    found = NOTHING
    if dtype not in _INFINITY:
        return found
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.view(f"i{bits.itemsize}")
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        # As signed integers the positive values are the greatest, as unsigned ones the negative: two plain maxima
        # tell that all is finite, without a temporary.
        if int(signed[start : start + _CHUNK].max()) < infinity and int(chunk.max()) < (sign | infinity):
            continue
        magnitude = chunk & chunk.dtype.type(sign - 1)
        nan, inf = magnitude > infinity, magnitude == infinity
        first = int(np.argmax(nan | inf))
        if nan[first] or inf[first]:
            found = found.merged(Findings(int(nan.sum()), int(inf.sum()), 0, first), start)
    return found


def find_overflow(bits: np.ndarray, source: str, out: np.ndarray, target: str) -> Findings:
    """Finite values of flat `bits` that are infinite in `out`, their cast to `target`."""
    found = NOTHING
    source_infinity, target_infinity = _INFINITY[source], _INFINITY[target]
    for start in range(0, bits.size, _CHUNK):
        result = out[start : start + _CHUNK]
        infinite = (result & result.dtype.type(2 ** (8 * out.itemsize - 1) - 1)) == target_infinity
        if not infinite.any():
            continue
        chunk = bits[start : start + _CHUNK]
        infinite &= (chunk & chunk.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)) < source_infinity
        if infinite.any():
            found = found.merged(Findings(0, 0, int(infinite.sum()), int(np.argmax(infinite))), start)
    return found
