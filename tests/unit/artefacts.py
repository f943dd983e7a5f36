"""One random matrix in every artefact, with what its stored parts stand for in fp64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from vllm_svd.format import Codebook, LowRank, LowRankInt8, Reduced


@dataclass
class Artefact:
    """One matrix: its module and stored parts, and what they stand for in fp64."""

    module: Any
    parts: dict[str, torch.Tensor]
    factors: list[torch.Tensor]
    """Their product, first to last, is the matrix [m, n]."""

    @property
    def correction(self) -> torch.Tensor:
        m = self.factors[0].shape[0]
        return self.parts.get("correction", torch.zeros(m)).double()

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.factors[0] if len(self.factors) == 1 else torch.linalg.multi_dot(self.factors)
        return x.double() @ dense.T + self.correction

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The expression of the reference in the dtype of x, its matrices dequantised."""
        for factor in reversed(self.factors):
            x = linear(x, factor.to(x.dtype))
        return x + self.correction.to(x.dtype)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def steps(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def scales(*shape: int, seed: int) -> torch.Tensor:
    """fp32 of few bits, so that products with 8-bit steps are exact."""
    return (randn(*shape, seed=seed).abs() + 0.1).bfloat16().float() / 100


def dense(m: int, n: int, seed: int, dtype: torch.dtype) -> Artefact:
    weight = randn(m, n, seed=seed, dtype=dtype)
    return Artefact(None, {"weight": weight}, [weight.double()])


def low_rank(m: int, n: int, seed: int, dtype: torch.dtype) -> Artefact:
    rank = min(m, n) // 2
    A, B = randn(rank, n, seed=seed, dtype=dtype), randn(m, rank, seed=seed + 1, dtype=dtype)
    module = LowRank(out_features=m, in_features=n, rank=rank)
    return Artefact(module, {"A": A, "B": B}, [B.double(), A.double()])


def int8(m: int, n: int, seed: int, dtype: torch.dtype, a_tail: int = 0, b_tail: int = 0) -> Any:
    r = min(m, n) // 2 + 1
    parts = {
        "A_int8": steps(r, n - a_tail, seed=seed),
        "A_scale": scales(r, seed=seed + 1),
        "B_int8": steps(m - b_tail, r, seed=seed + 2),
        "B_scale": scales(r, seed=seed + 3),
    }
    A, B = parts["A_int8"] * parts["A_scale"].double()[:, None], parts["B_int8"].double()
    B = B * parts["B_scale"].double()
    if a_tail:
        parts["A_tail"] = randn(r, a_tail, seed=seed + 4, dtype=dtype)
        A = torch.cat([A, parts["A_tail"].double()], dim=1)
    if b_tail:
        parts["B_tail"] = randn(b_tail, r, seed=seed + 5, dtype=dtype)
        B = torch.cat([B, parts["B_tail"].double()])
    module = LowRankInt8(out_features=m, in_features=n, rank=r, a_tail=a_tail, b_tail=b_tail)
    return Artefact(module, parts, [B, A])


def int8_tails(m: int, n: int, seed: int, dtype: torch.dtype) -> Artefact:
    """Tails that neither halves nor quarters of an axis are cut at."""
    return int8(m, n, seed, dtype, a_tail=n // 2 + 1, b_tail=m // 4 + 1)


def vector_quantised(
    m: int,
    n: int,
    seed: int,
    dtype: torch.dtype,
    dim: int = 3,
    bits: int = 5,
    group_rows: int = 5,
    group_columns: int = 9,
) -> Artefact:
    """By default vectors, words and strips end nowhere near where ranks are cut."""
    del dtype
    module = Codebook(
        out_features=m,
        in_features=n,
        dim=dim,
        index_bits=bits,
        group_rows=group_rows,
        group_columns=group_columns,
    )
    vectors, words = module.vectors, module.parts()["indices"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(1 << bits, (m, vectors), generator=generator)
    centroids = steps(*module.groups, 1 << bits, dim, seed=seed + 1)
    scale = scales(*module.groups, seed=seed + 2)
    streams = [sum(value << bits * at for at, value in enumerate(row)) for row in index.tolist()]
    packed = b"".join(stream.to_bytes(4 * words, "little") for stream in streams)
    matrix = torch.empty(m, vectors * dim, dtype=torch.float64)
    for i in range(m):
        for v in range(vectors):
            strip = i // group_rows, v * dim // group_columns
            matrix[i, v * dim : (v + 1) * dim] = centroids[strip][index[i, v]] * scale[strip]
    parts = {
        "indices": torch.frombuffer(bytearray(packed), dtype=torch.int32).view(m, words),
        "codebooks": centroids,
        "scales": scale,
    }
    return Artefact(module, parts, [matrix[:, :n]])


def reduced(
    m: int, n: int, seed: int, dtype: torch.dtype, out: int | None = None, into: int | None = None
) -> Artefact:
    generator = torch.Generator().manual_seed(seed)
    out, into = out or m, into or n // 2
    rows = torch.randperm(m, generator=generator)[:out].sort().values
    columns = torch.randperm(n, generator=generator)[:into].sort().values
    parts = {"reduced": randn(out, into, seed=seed, dtype=dtype)}
    matrix = torch.zeros(m, n, dtype=torch.float64)
    matrix[rows[:, None], columns] = parts["reduced"].double()
    if out < m:
        parts["rows"] = rows.int()
    if into < n:
        parts["columns"] = columns.int()
    module = Reduced(out_features=m, in_features=n, kept_out=out, kept_in=into)
    return Artefact(module, parts, [matrix])


MAKERS: dict[str, Any] = {
    "dense": dense,
    "low_rank": low_rank,
    "int8": int8,
    "int8_tails": int8_tails,
    "codebook": vector_quantised,
    "reduced": reduced,
}


def artefact(
    kind: str, m: int, n: int, seed: int = 0, dtype: Any = torch.float64, corrected: bool = False
) -> Artefact:
    made: Artefact = MAKERS[kind](m, n, seed, dtype)
    return with_correction(made, seed, dtype) if corrected else made


def with_correction(made: Artefact, seed: int, dtype: torch.dtype) -> Artefact:
    made.module = made.module.model_copy(update={"correction": True})
    made.parts["correction"] = randn(made.module.out_features, seed=seed + 9, dtype=dtype)
    return made
