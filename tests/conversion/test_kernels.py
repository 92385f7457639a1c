"""The transpose kernels against numpy, the casts against torch, and the search for values that are not finite."""

import math

import numpy as np
import pytest
import torch

from conversion.cast import Findings, cast, cast_into, find_non_finite, find_overflow, storage_dtype
from conversion.shard_io import DTYPE_BYTES
from conversion.transpose import WORTH_NUMBA, choose_kernel, torch_kernel, transpose_numpy

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def kernels():
    yield pytest.param(transpose_numpy, id="numpy")
    simd = choose_kernel(WORTH_NUMBA)
    missing = pytest.mark.skipif(simd is transpose_numpy, reason="numba is not installed")
    yield pytest.param(simd, id="simd", marks=missing)
    yield pytest.param(torch_kernel("cpu"), id="torch")
    if torch.cuda.is_available():
        cuda = torch_kernel("cuda")
        yield pytest.param(cuda, id="cuda", marks=pytest.mark.gpu)
    else:
        skip = pytest.mark.skip(reason="no CUDA device")
        yield pytest.param(None, id="cuda", marks=[pytest.mark.gpu, skip])


@pytest.mark.parametrize("kernel", list(kernels()))
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 300), (130, 259), (513, 40), (600, 1100)])
def test_transpose(kernel, dtype, shape):
    rows, cols = shape
    generator = np.random.default_rng(rows * cols)
    # Views into larger arrays: rows are strided, as the gate half of a matrix is, and nothing around may change.
    frame = generator.integers(0, 2**16, (cols + 3, rows + 5)).astype(dtype)
    matrix = frame[2 : 2 + cols, 4 : 4 + rows]
    canvas = np.full((rows + 2, cols + 7), 7, dtype)
    expected = canvas.copy()
    expected[1 : 1 + rows, 3 : 3 + cols] = matrix.T
    kernel(canvas[1 : 1 + rows, 3 : 3 + cols], matrix)
    np.testing.assert_array_equal(canvas, expected)


def test_small_conversions_do_without_numba():
    assert choose_kernel(WORTH_NUMBA - 1) is transpose_numpy


def bits_of(dtype: str) -> np.ndarray:
    """Every 16-bit pattern; for wider dtypes random ones, and values over the whole range of exponents."""
    size = DTYPE_BYTES[dtype]
    if size == 2:
        return np.arange(2**16, dtype=np.uint16)
    generator = np.random.default_rng(size)
    any_bits = generator.integers(0, 2 ** (8 * size), 20000, dtype=storage_dtype(dtype))
    values = generator.standard_normal(20000) * np.exp(10 * generator.standard_normal(20000))
    return np.concatenate([any_bits, values.astype(f"f{size}").view(any_bits.dtype)])


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TORCH[dtype])


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("source", ["BF16", "F16", "F32", "F64"])
def test_cast_is_torchs(source, target):
    bits = bits_of(source)
    if (source, target) == ("F64", "F16"):
        # torch rounds twice here, through float32; numpy once, to the nearest. Keep to what float32 can hold.
        with np.errstate(all="ignore"):
            bits = bits.view(np.float64).astype(np.float32).astype(np.float64).view(np.uint64)
    out = np.zeros(bits.shape, storage_dtype(target))
    cast_into(out, bits, source, target)
    expected = as_torch(bits, source).to(TORCH[target])
    torch.testing.assert_close(as_torch(out, target), expected, rtol=0, atol=0, equal_nan=True)
    # assert_close holds 0 and -0 for equal.
    finite = ~expected.isnan()
    torch.testing.assert_close(torch.signbit(as_torch(out, target))[finite], torch.signbit(expected)[finite])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_every_non_finite_value_is_found(dtype):
    bits = bits_of(dtype)
    values = as_torch(bits, dtype).double()
    found = find_non_finite(bits, dtype)
    assert found.nan == int(values.isnan().sum()) > 0
    assert found.inf == int(values.isinf().sum())
    first = int((~values.isfinite()).nonzero()[0])
    assert found.first == first
    assert find_non_finite(bits[:first], dtype) == Findings()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("place", [0, 32 * 1024 - 1, 32 * 1024, 99_999])
def test_one_bad_value_among_many(value, place):
    values = np.full(100_000, -3.0e38, np.float32)
    values[place] = value
    found = find_non_finite(values.view(np.uint32), "F32")
    expected = (1, 0) if math.isnan(value) else (0, 1)
    assert (found.nan, found.inf, found.first) == (*expected, place)


def test_overflow_counts_only_finite_values():
    values = np.array([1.0, 65504.0, 65520.0, -1e6, np.inf, -np.inf, np.nan], np.float32)
    bits = values.view(np.uint32)
    found = find_overflow(bits, "F32", cast(bits, "F32", "F16"), "F16")
    assert found == Findings(0, 0, 2, 2)


def test_findings_merge_keeps_the_first_and_shifts_the_second():
    assert Findings(1, 0, 0, 5).merged(Findings(0, 2, 0, 3), 100) == Findings(1, 2, 0, 5)
    assert Findings().merged(Findings(0, 2, 1, 3), 100) == Findings(0, 2, 1, 103)
