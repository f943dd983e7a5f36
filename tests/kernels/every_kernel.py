"""Every attention kernel that this machine can run: its batches, and what it gives of them."""

import functools

import paged_cases
import torch
from hypothesis import strategies as st
from paged_cases import DEVICE, Case, Tiers

from vllm_svd.kernels import native
from vllm_svd.kernels.latent_attention import compiled, cpu, triton
from vllm_svd.kernels.latent_layout import LatentLayout

ON_CPU = [cpu, compiled] if native.is_there() else [cpu]
KERNELS = [triton] if DEVICE == "cuda" else [*ON_CPU, triton]

THREE = ((8, "int8"), (16, "int4"), (8, "int2"))

build = functools.partial(paged_cases.build, device=DEVICE)


def check(kernel, *cases: Case) -> None:
    def run(case: Case) -> torch.Tensor:
        output = torch.full(case.shape, torch.nan, dtype=case.query.dtype, device=DEVICE)
        kernel.attend(case.query, case.cache, case.batch, output, **settings_of(kernel, case))
        return output

    # Triton multiplies rebuilt keys and weights in the tensors' dtype, as tensor cores must.
    paged_cases.check(
        run, *cases, plain=cases[0].query.dtype if kernel is triton else torch.float32
    )


def settings_of(kernel, case: Case) -> dict:
    """On a GPU the layer projects outputs."""
    settings = dict(case.settings)
    if kernel is triton:
        assert settings.pop("v_up") is None
    return settings


def same_slots(layout: LatentLayout, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Slots [..., width] bit for bit, but for what fills them up."""
    if layout.quantised:
        runs = [run for side in layout.runs for run in side]
        used = [b for run in runs for b in (*range(layout.width)[run.code_slice], run.scale)]
        assert len(set(used)) == len(used) <= layout.width
        found, expected = found[..., used], expected[..., used]
    return torch.equal(found, expected)


def half(kernel) -> torch.dtype:
    """Not bf16 in the interpreter, which multiplies its bit patterns: numpy has no bf16."""
    return torch.float16 if kernel is triton and DEVICE == "cpu" else torch.bfloat16


def sides() -> st.SearchStrategy[Tiers]:
    """Any tiers of one side: fewer bits from one to the next."""
    stores = st.tuples(
        st.sampled_from([None, "fp8_e4m3", "int8"]),
        st.sampled_from([None, "int4"]),
        st.sampled_from([None, "int2"]),
    ).map(lambda chosen: [store for store in chosen if store])
    return stores.filter(len).flatmap(
        lambda some: st.tuples(
            *(st.tuples(st.integers(1, 6).map(lambda n: 4 * n), st.just(store)) for store in some)
        )
    )


def heads() -> st.SearchStrategy[dict]:
    """Sizes of heads that models have, both rotary styles, and any part of the head turned."""
    return st.sampled_from([32, 64, 80, 96, 128, 256]).flatmap(
        lambda d: st.fixed_dictionaries(
            {
                "d": st.just(d),
                "rotary_dim": st.one_of(st.none(), st.integers(1, d // 2).map(lambda n: 2 * n)),
                "neox": st.booleans(),
            }
        )
    )
