"""Jobs: what a launch shall do, said with tensors or with raw addresses.

Each function here returns one `Job`, checked; `fp8sync_kernels.table.build_table` turns a list of
them into a descriptor table. A job holds addresses only. Its memory must stay where it is, and
allocated, for as long as a table made from the job is launched.

What comes of them is shown by `fp8sync_kernels.run_table`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fp8sync_kernels.descriptor import DTYPE_COUNTED, DTYPE_OF_TORCH, Op
from fp8sync_kernels.formulas import BLOCK, FP32, check_formula

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CODES = (torch.float8_e4m3fn, torch.uint8)
_COPY_OF = {dtype: op for op, dtype in DTYPE_COUNTED.items()}


@dataclass(frozen=True)
class Matrix:
    """A rectangle in memory, elements of a row adjacent.

    Attributes:
        address: of element (0, 0), in bytes, as the launching device sees it.
        rows: number of rows.
        cols: elements in a row.
        stride: elements from one row to the next.
        dtype: of the elements.

    Examples:
        >>> half = Matrix.of(torch.zeros(4, 8)[:, :2])
        >>> half.rows, half.cols, half.stride, half.as_bytes().cols
        (4, 2, 8, 8)
    """

    address: int
    rows: int
    cols: int
    stride: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Matrix:
        """The rectangle that a 2-D tensor (or a 1-D one, as a single row) lies in.

        Raises:
            ValueError: elements of a row are not adjacent, or the tensor has more dims.
        """
        if tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"expected 2-D with unit inner stride, got shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}"
            )
        rows, cols = tensor.shape
        stride = tensor.stride(0) if rows > 1 else cols
        return cls(tensor.data_ptr(), rows, cols, stride, tensor.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def as_bytes(self) -> Matrix:
        """The same memory as bytes."""
        size = self.itemsize
        return Matrix(self.address, self.rows, self.cols * size, self.stride * size, torch.uint8)


Memory = Matrix | torch.Tensor


@dataclass(frozen=True)
class Part:
    """Where a job's digest goes, and which bytes of the digested part the job stands for.

    The default is the whole part: codes (or bytes) row after row from byte 0, scale_inv behind them
    from the next multiple of 16. A job that writes a piece of a larger tensor says where the piece
    lies, and the digests of all pieces then add up to the tensor's.

    Attributes:
        slot: index into the digests and the nonfinite counts of a launch.
        base: bytes, position of the first element.
        pitch: bytes from one row to the next; None: rows follow each other.
        scale_base: bytes, position of the first scale_inv; None: behind codes whose rows follow each
            other.
        scale_pitch: bytes from one row of scale_inv to the next; None: rows follow each other.

    Examples:
        >>> right = Part(slot=3, base=128, pitch=256)  # the right half of a matrix of 256 columns
    """

    slot: int = 0
    base: int = 0
    pitch: int | None = None
    scale_base: int | None = None
    scale_pitch: int | None = None


@dataclass(frozen=True)
class Job:
    """One rectangle's work, with everything a table row needs. Made by the functions below.

    Attributes:
        op: what is done.
        source: read.
        destination: written; None: digest only.
        scale_inv: float32 of each block touched, written or read; None: neither.
        amax: float32 of each block touched, written or read; None: neither.
        origin: position of the source's first element within its first block.
        part: of the digest.

    Examples:
        >>> norm = torch.ones(128)
        >>> copy(norm, torch.empty_like(norm)).op.name
        'COPY'
    """

    op: Op
    source: Matrix
    destination: Matrix | None
    scale_inv: Matrix | None
    amax: Matrix | None
    origin: tuple[int, int]
    part: Part


def quantize(
    x: Memory,
    formula: str,
    weight: Memory | None,
    scale_inv: Memory | None,
    part: Part = Part(),
    *,
    amax: Memory | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Job:
    """Quantize a rectangle in 128x128 blocks, count its NaN and Inf, digest the result.

    Args:
        x: bf16, fp16 or fp32 ``[N, K]``.
        formula: ``"pow2"`` or ``"fp32"``.
        weight: float8_e4m3fn or uint8 ``[N, K]`` to write; None: digest only.
        scale_inv: float32 ``[blocks down, blocks across]`` to write; None: neither written nor
            digested (some other holder of the block does it).
        part: of the digest.
        amax: float32 ``[blocks down, blocks across]`` to use in the place of x's own maximum.
        origin: position of x's first element within its first block.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: unknown formula, an origin outside a block, shapes that do not fit, an address
            that is no multiple of its elements' size, or written rows that overlap.

    Examples:
        >>> x, weight = torch.ones(256, 128), torch.empty(256, 128, dtype=torch.uint8)
        >>> quantize(x, "fp32", weight, torch.empty(2, 1)).op.name
        'FP32'
    """
    given = amax is not None
    if check_formula(formula) == FP32:
        op = Op.FP32_GIVEN if given else Op.FP32
    else:
        op = Op.POW2_GIVEN if given else Op.POW2
    return _blockwise(op, x, weight, scale_inv, amax, origin, part)


def partial_amax(
    x: Memory, amax: Memory, part: Part = Part(), *, origin: tuple[int, int] = (0, 0)
) -> Job:
    """Write each block's largest magnitude within `x` (float32); count NaN and Inf of `x`.

    Arguments and errors are those of `quantize`.

    Examples:
        >>> partial_amax(torch.ones(86, 128), torch.empty(2, 1), origin=(86, 0)).op.name
        'AMAX'
    """
    return _blockwise(Op.AMAX, x, None, None, amax, origin, part)


def canonical_digest(weight: Memory, scale_inv: Memory, part: Part = Part()) -> Job:
    """Digest an FP8 pair in the form it has once quantized anew by pow2; nothing is written.

    Equal for a pair and for its exact re-encodings, as vLLM makes them at load. `weight` must begin
    at a block's first element.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: `scale_inv` does not have one value for each block.

    Examples:
        >>> canonical_digest(torch.zeros(256, 128, dtype=torch.uint8), torch.ones(2, 1)).op.name
        'CANONICAL'
    """
    source, scales = _matrix("weight", weight), _matrix("scale_inv", scale_inv)
    _require_elements("weight", source, _CODES)
    _require_grid("scale_inv", scales, source, (0, 0))
    return Job(Op.CANONICAL, source, None, scales, None, (0, 0), part)


def copy(source: Memory, destination: Memory | None, part: Part = Part()) -> Job:
    """Move bytes between rectangles of any dtype and digest them; without destination digest only.

    Raises:
        ValueError: rows or bytes in a row differ, or the destination's rows overlap.

    Examples:
        >>> bucket = torch.zeros(512, dtype=torch.uint8)
        >>> copy(torch.ones(128), bucket, Part(slot=1)).source.cols
        512
    """
    moved = _matrix("source", source).as_bytes()
    target = None if destination is None else _matrix("destination", destination).as_bytes()
    if target is not None:
        _require_destination("destination", target, moved)
    return Job(Op.COPY, moved, target, None, None, (0, 0), part)


def copy_codes(source: Memory, destination: Memory | None, part: Part = Part()) -> Job:
    """Move FP8 codes and digest them, as `copy` does; count the NaN (0x7F and 0xFF) among them.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: rows or bytes in a row differ, or the destination's rows overlap.

    Examples:
        >>> weight = torch.zeros(256, 128).to(torch.float8_e4m3fn)
        >>> copy_codes(weight, torch.empty_like(weight)).op.name
        'COPY_CODES'
    """
    codes = _matrix("source", source)
    _require_elements("source", codes, _CODES)
    return replace(copy(codes, destination, part), op=Op.COPY_CODES)


def cast(source: Memory, destination: Memory, part: Part = Part()) -> Job:
    """Convert between bf16, fp16 and fp32 (nearest even); count NaN and Inf of the result, and digest it.

    What is too large for the destination's dtype becomes infinite there, and counts.

    To the same dtype that is a copy, of NaN too; which NaN a NaN becomes in another is not defined.

    Raises:
        TypeError: another dtype.
        ValueError: shapes differ, an address that is no multiple of its elements' size, or rows of
            the destination that overlap.

    Examples:
        >>> cast(torch.ones(128), torch.empty(128, dtype=torch.bfloat16)).op.name
        'CAST'
        >>> cast(torch.ones(128), torch.empty(128)).op.name
        'COPY_FP32'
    """
    given, target = _matrix("source", source), _matrix("destination", destination)
    _require_elements("source", given, _FLOATS)
    _require_elements("destination", target, _FLOATS)
    _require_destination("destination", target, given)
    if given.dtype == target.dtype:
        return replace(copy(given, target, part), op=_COPY_OF[given.dtype])
    return Job(Op.CAST, given, target, None, None, (0, 0), part)


def _blockwise(
    op: Op,
    x: Memory,
    weight: Memory | None,
    scale_inv: Memory | None,
    amax: Memory | None,
    origin: tuple[int, int],
    part: Part,
) -> Job:
    source = _matrix("x", x)
    _require_elements("x", source, _FLOATS)
    if not all(0 <= start < BLOCK for start in origin):
        raise ValueError(f"origin {origin} lies outside a {BLOCK}x{BLOCK} block")
    target = None if weight is None else _matrix("weight", weight)
    if target is not None:
        _require_elements("weight", target, _CODES)
        _require_destination("weight", target, source)
    scales = None if scale_inv is None else _require_grid("scale_inv", scale_inv, source, origin)
    maxima = None if amax is None else _require_grid("amax", amax, source, origin)
    if scales is not None:
        _require_apart("scale_inv", scales)
    if maxima is not None and op is Op.AMAX:
        _require_apart("amax", maxima)
    return Job(op, source, target, scales, maxima, origin, part)


def _matrix(name: str, memory: Memory) -> Matrix:
    if isinstance(memory, Matrix):
        return memory
    try:
        return Matrix.of(memory)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _require_elements(name: str, given: Matrix, allowed: tuple[torch.dtype, ...]) -> None:
    if given.dtype not in allowed or given.dtype not in DTYPE_OF_TORCH:
        raise TypeError(f"{name} has dtype {given.dtype}, expected one of {allowed}")
    if given.address % given.itemsize:
        raise ValueError(
            f"{name} lies at {given.address:#x}, no multiple of {given.itemsize} bytes"
        )


def _require_destination(name: str, given: Matrix, expected: Matrix) -> None:
    if (given.rows, given.cols) != (expected.rows, expected.cols):
        raise ValueError(
            f"{name} is {given.rows}x{given.cols}, its source {expected.rows}x{expected.cols}"
        )
    _require_apart(name, given)


def _require_apart(name: str, written: Matrix) -> None:
    if written.rows > 1 and written.stride < written.cols:
        raise ValueError(
            f"{name} has rows of {written.cols} elements, {written.stride} apart: they overlap"
        )


def _require_grid(name: str, memory: Memory, source: Matrix, origin: tuple[int, int]) -> Matrix:
    given = _matrix(name, memory)
    _require_elements(name, given, (torch.float32,))
    grid = (-(-(origin[0] + source.rows) // BLOCK), -(-(origin[1] + source.cols) // BLOCK))
    if (given.rows, given.cols) != grid:
        raise ValueError(f"{name} is {given.rows}x{given.cols}, the blocks are {grid[0]}x{grid[1]}")
    return given
