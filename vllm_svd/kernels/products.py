"""Products in half precision on CPUs that have no units for it.

torch emulates them there, five to ten times more slowly than it multiplies in fp32. So operands are
widened for the one product that reads them, large weights a tile at a time; what is kept of them
stays in half precision, and the result is rounded once.
"""

import torch
import torch.nn.functional as F  # noqa: N812

# Asked here, not where products are made: compilation cannot trace the question.
_HAS_MKLDNN = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
# oneDNN calls any AVX-512 enough for bf16, and emulates it with vectors of fp32 where units lack.
_LACKS_UNITS = torch.cpu._is_avx512_supported() and not (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
_EMULATES_BF16 = _HAS_MKLDNN and (_LACKS_UNITS or not torch.ops.mkldnn._is_mkldnn_bf16_supported())
_EMULATES_FP16 = _HAS_MKLDNN and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
# Of fewer rows a product reads its weights once, in half precision, at the speed of memory.
FEW_ROWS = 4
TILE_ELEMENTS = 1 << 24


def emulated(x: torch.Tensor) -> bool:
    """Whether this machine emulates products in the dtype and on the device of `x`."""
    return x.device.type == "cpu" and (
        (x.dtype == torch.bfloat16 and _EMULATES_BF16)
        or (x.dtype == torch.float16 and _EMULATES_FP16)
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., n] times weight [m, n], plus bias [m], in the dtype of x."""
    if not emulated(x):
        return F.linear(x, weight, bias)
    operands = (x, weight) if bias is None else (x, weight, bias)
    few = x.numel() < FEW_ROWS * x.shape[-1]
    if torch.compiler.is_compiling():  # a graph for any number of rows decides when it runs
        y: torch.Tensor = torch.cond(few, _as_it_is, _in_fp32, operands)
        return y
    return _as_it_is(*operands) if few else _in_fp32(*operands)


def _as_it_is(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _in_fp32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    wide = x.float()
    step = max(1, TILE_ELEMENTS // weight.shape[1])
    tiles = [F.linear(wide, tile.float()) for tile in torch.split(weight, step)]
    y = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def widened(weight: torch.Tensor) -> torch.Tensor:
    """In fp32 where every product would widen it: for small matrices, to keep them so."""
    return weight.float() if emulated(weight) else weight


def per_head(x: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, rows, n] times each head's basis [heads, n, m]: [tokens, heads, rows, m].

    In the dtype of x; that of the bases may be wider.

    Not by einsum, whose own planning takes longer than the product of a decode step.
    """
    tokens, heads, rows, width = x.shape
    flat = x.transpose(0, 1).reshape(heads, tokens * rows, width)
    if emulated(x):
        y = torch.bmm(flat.float(), bases.float()).to(x.dtype)
    else:
        y = torch.bmm(flat, bases.to(x.dtype))
    return y.view(heads, tokens, rows, bases.shape[-1]).transpose(0, 1)


def of_query_heads(x: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """x [..., heads, n] times the bases [KV heads, n, m] of their KV heads: [..., heads, m]."""
    heads, width = x.shape[-2:]
    by_kv_head = x.reshape(-1, len(bases), heads // len(bases), width)
    return per_head(by_kv_head, bases).reshape(*x.shape[:-1], bases.shape[-1])


def project(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [tokens, groups * g, d] in the rows of down [groups, rank, g * d]: [tokens, groups, rank].

    Contiguous: vLLM's CUDA kernels that store keys assume so of heads within a token.
    """
    by_group = x.reshape(len(x), len(down), 1, -1)
    return per_head(by_group, down.transpose(1, 2)).squeeze(2).contiguous()
