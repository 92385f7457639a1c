"""Triton kernels behind `rms_norm.py` and `rotary.py`, which hold the readable references.

All are bound by memory: each tensor is read and written once, rows in tiles of a few thousand elements. Sums over
rows go through a fixed number of partial sums, so results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl

_TILE = 4096  # elements per program and step
_PARTIALS = 512  # partial sums of a weight gradient; a few programs for each multiprocessor


@triton.jit
def _rms_norm_kernel(x, weight, y, inverse_rms, rows, H, eps, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_H)[None, :]
    at = row[:, None] * H + column
    mask = (row[:, None] < rows) & (column < H)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / H + eps)
    normalised = (value * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, normalised * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32), mask=mask)
    tl.store(inverse_rms + row, scale, mask=row < rows)


@triton.jit
def _rms_norm_backward_kernel(
    d_y, x, weight, inverse_rms, d_x, d_weight, rows, H, steps, ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)[None, :]
    gain = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros([1, BLOCK_H], dtype=tl.float32)
    for step in range(steps):
        row = ((program * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * H + column
        mask = (row[:, None] < rows) & (column < H)
        scale = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        normalised = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(d_y + at, mask=mask, other=0.0).to(tl.float32)
        rounded = normalised.to(d_y.dtype.element_ty).to(tl.float32)
        total += tl.sum(grad * rounded, axis=0)[None, :]
        grad = grad * gain
        mean = tl.sum(grad * normalised, axis=1)[:, None] / H
        tl.store(d_x + at, (grad - normalised * mean) * scale, mask=mask)
    tl.store(d_weight + program * H + column, total, mask=column < H)


def _rows_per_program(width: int) -> tuple[int, int]:
    """Rows and padded columns of a tile, for rows of `width` elements."""
    block = triton.next_power_of_2(width)
    return max(_TILE // block, 1), block


def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., H), weight (H,) -> y like x, and 1 / rms(x) of each row, float32."""
    x = x.contiguous()
    H = x.shape[-1]
    rows = x.numel() // H
    y, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    tile, block = _rows_per_program(H)
    _rms_norm_kernel[(triton.cdiv(rows, tile),)](x, weight, y, inverse_rms, rows, H, eps, ROWS=tile, BLOCK_H=block)
    return y, inverse_rms


def rms_norm_backward(
    d_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of `rms_norm_forward`: d_x like x, d_weight (H,) in the weight's dtype."""
    d_y, x = d_y.contiguous(), x.contiguous()
    H = x.shape[-1]
    rows = x.numel() // H
    tile, block = _rows_per_program(H)
    steps = triton.cdiv(triton.cdiv(rows, tile), _PARTIALS)
    programs = triton.cdiv(rows, tile * steps)
    d_x, partial = torch.empty_like(x), x.new_empty(programs, H, dtype=torch.float32)
    _rms_norm_backward_kernel[(programs,)](
        d_y, x, weight, inverse_rms, d_x, partial, rows, H, steps, ROWS=tile, BLOCK_H=block
    )
    return d_x, partial.sum(0).to(weight.dtype)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    y,
    rows,
    N,
    HALF,
    stride_token,
    stride_head,
    out_token,
    out_head,
    table_stride,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < HALF)
    token, head = row // N, row % N
    source = x + token * stride_token + head * stride_head + column
    target = y + token * out_token + head * out_head + column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + token * table_stride + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + token * table_stride + column, mask=mask, other=0.0).to(tl.float32) * SIGN
    tl.store(target, first * c - second * s, mask=mask)
    tl.store(target + HALF, second * c + first * s, mask=mask)


def _launch(x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> None:
    """x and y (T, N, D), their last dimension contiguous; cos and sin (T, D)."""
    tokens, heads, dim = x.shape
    block = triton.next_power_of_2(dim // 2)
    tile = max(_TILE // (2 * block), 1)
    _rotate_kernel[(triton.cdiv(tokens * heads, tile),)](
        x,
        cos,
        sin,
        y,
        tokens * heads,
        heads,
        dim // 2,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        cos.stride(0),
        SIGN=-1 if back else 1,
        ROWS=tile,
        BLOCK=block,
    )


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x (..., T, N, D) turned by cos and sin (..., T, D), or turned back; a new, contiguous tensor."""
    flat = x.flatten(0, -3)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    _launch(flat, y, *_tables(cos, sin), back)
    return y.view(x.shape)


@triton.jit
def _joint_kernel(
    query,
    key,
    value,
    joint,
    cos,
    sin,
    rows,
    N,
    HALF,
    token_stride,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """joint (P, 3, N, D) -> itself rotated at `query` (P, 3, N, D), or, going back, three (P, N, D) -> joint."""
    part = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < HALF)
    token, head = row // N, row % N
    whole = token * 3 * token_stride + part * token_stride + head * 2 * HALF + column
    if BACK:
        source = query
        if part == 1:
            source = key
        if part == 2:
            source = value
        source = source + token * token_stride + head * 2 * HALF + column
        target = joint + whole
    else:
        source = joint + whole
        target = query + whole
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if part < 2:
        c = tl.load(cos + token * 2 * HALF + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * HALF + column, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    tl.store(target, first, mask=mask)
    tl.store(target + HALF, second, mask=mask)


def _launch_joint(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    joint: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    back: bool,
) -> None:
    tokens, _, heads, dim = joint.shape
    block = triton.next_power_of_2(dim // 2)
    tile = max(_TILE // (2 * block), 1)
    grid = (triton.cdiv(tokens * heads, tile), 3)
    _joint_kernel[grid](
        query,
        key,
        value,
        joint,
        *tables,
        tokens * heads,
        heads,
        dim // 2,
        heads * dim,
        BACK=back,
        ROWS=tile,
        BLOCK=block,
    )


def rotate_qkv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """A joint projection (P, 3 N D) as a new (P, 3, N, D), queries and keys turned by cos and sin (P, D)."""
    joint = qkv.contiguous().view(qkv.shape[0], 3, heads, -1)
    out = torch.empty_like(joint)
    _launch_joint(out, out, out, joint, _tables(cos, sin), back=False)
    return out


def rotate_back_qkv(
    d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The adjoint of `rotate_qkv`: three (P, N, D) -> (P, 3 N D), new."""
    parts = [part.contiguous() for part in (d_query, d_key, d_value)]
    tokens, heads, dim = d_query.shape
    joint = d_query.new_empty(tokens, 3, heads, dim)
    _launch_joint(*parts, joint, _tables(cos, sin), back=True)
    return joint.flatten(1)
