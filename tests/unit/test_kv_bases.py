"""The optimal K/V bases: identities of the solver."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline_compress.kv import KVStatistics, kv_error, project
from offline_compress.kv.basis import solve, weighted_error
from vllm_svd.errors import SvdError
from vllm_svd.format import KVProjection, Stored

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 16)


def psd(seed: int, size: int, rank: int | None = None) -> torch.Tensor:
    """A random second moment of the given rank; of full rank it is well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(
        size, size if rank is None else rank, generator=generator, dtype=torch.float64
    )
    ridge = 0.0 if rank is not None else 0.1
    return samples @ samples.mT + ridge * torch.eye(size, dtype=torch.float64)


def draw_rank(data: st.DataObject, size: int, smallest: int = 1) -> int:
    return data.draw(st.integers(smallest, size))


def spectrum(metric: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of M^(1/2) C M^(1/2), decreasing, through the similar L^T C L with M = L L^T."""
    factor = torch.linalg.cholesky(metric)
    return torch.linalg.eigvalsh(factor.mT @ second_moment @ factor).flip(0)


@given(data=st.data(), seed=seeds, size=sizes)
def test_full_rank_is_the_identity_even_for_singular_moments(data, seed, size):
    metric = psd(seed, size, draw_rank(data, size, 0))
    second_moment = psd(seed + 1, size, draw_rank(data, size, 0))
    up, down = solve(metric, second_moment, size)
    identity = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(up @ down, identity, rtol=0, atol=1e-10)
    assert torch.equal(up, down.mT)


@given(data=st.data(), seed=seeds, size=sizes)
def test_down_is_orthonormal_and_a_latent_survives_the_round_trip(data, seed, size):
    rank = draw_rank(data, size)
    metric = psd(seed, size, draw_rank(data, size, 0))
    second_moment = psd(seed + 1, size, draw_rank(data, size, 0))
    up, down = solve(metric, second_moment, rank)
    assert up.isfinite().all() and down.isfinite().all()
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(down @ down.mT, identity, rtol=0, atol=1e-12)
    # the regression of a singular C can be steep, and cancels in proportion to its coefficients
    assert torch.allclose(down @ up, identity, rtol=0, atol=1e-12 * (1 + float(up.norm())))


@given(data=st.data(), seed=seeds, size=sizes)
def test_error_is_the_sum_of_the_dropped_eigenvalues(data, seed, size):
    metric, second_moment = psd(seed, size), psd(seed + 1, size)
    rank = draw_rank(data, size)
    values = spectrum(metric, second_moment)
    error = weighted_error(metric, second_moment, *solve(metric, second_moment, rank))
    assert error == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-7, abs=1e-12)


@given(data=st.data(), seed=seeds, size=sizes)
def test_no_other_projection_is_better(data, seed, size):
    metric, second_moment = psd(seed, size), psd(seed + 1, size)
    rank = draw_rank(data, size - 1)
    up, down = solve(metric, second_moment, rank)
    best = weighted_error(metric, second_moment, up, down)
    generator = torch.Generator().manual_seed(seed)
    for distance in (1e-3, 1e-1, 10.0):
        other_up = up + distance * torch.randn(up.shape, generator=generator, dtype=up.dtype)
        other_down = down + distance * torch.randn(down.shape, generator=generator, dtype=up.dtype)
        assert weighted_error(metric, second_moment, other_up, down) > best
        assert weighted_error(metric, second_moment, other_up, other_down) > best


@given(data=st.data(), seed=seeds, size=sizes)
def test_weighting_beats_plain_pca_where_it_counts(data, seed, size):
    metric, second_moment = psd(seed, size), psd(seed + 1, size)
    rank = draw_rank(data, size)
    _, vectors = torch.linalg.eigh(second_moment)
    principal = vectors.flip(-1)[:, :rank]
    plain = weighted_error(metric, second_moment, principal, principal.mT)
    weighted = weighted_error(metric, second_moment, *solve(metric, second_moment, rank))
    assert weighted <= plain * (1 + 1e-9) + 1e-12


@given(data=st.data(), seed=seeds, size=sizes)
def test_singular_moments_reach_the_optimum_too(data, seed, size):
    """Eigenvalues of M C equal those of M^(1/2) C M^(1/2), with no root and no inverse."""
    metric = psd(seed, size, draw_rank(data, size))
    second_moment = psd(seed + 1, size, draw_rank(data, size))
    rank = draw_rank(data, size)
    values = torch.linalg.eigvals(metric @ second_moment).real.sort(descending=True).values
    error = weighted_error(metric, second_moment, *solve(metric, second_moment, rank))
    # the floor of the metric and the damping each cost at most about sqrt(1e-10), relative
    assert error == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-5)


@given(data=st.data(), seed=seeds, size=sizes)
def test_a_head_nothing_reads_falls_back_to_pca(data, seed, size):
    second_moment, rank = psd(seed, size), draw_rank(data, size)
    up, down = solve(torch.zeros_like(second_moment), second_moment, rank)
    identity = torch.eye(size, dtype=torch.float64)
    values = torch.linalg.eigvalsh(second_moment).flip(0)
    expected = float(values[rank:].sum() / values.sum())
    assert weighted_error(identity, second_moment, up, down) == pytest.approx(
        expected, rel=1e-7, abs=1e-12
    )


@given(data=st.data(), seed=seeds, size=sizes)
def test_a_dead_head_gets_orthonormal_bases(data, seed, size):
    metric, rank = psd(seed, size), draw_rank(data, size)
    zero = torch.zeros_like(metric)
    up, down = solve(metric, zero, rank)
    assert torch.equal(up, down.mT)
    assert weighted_error(metric, zero, up, down) == 0.0


@given(
    data=st.data(),
    seed=seeds,
    size=sizes,
    scales=st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
)
def test_units_of_activations_do_not_matter(data, seed, size, scales):
    metric, second_moment, rank = psd(seed, size), psd(seed + 1, size), draw_rank(data, size)
    error = weighted_error(metric, second_moment, *solve(metric, second_moment, rank))
    rescaled = solve(10.0 ** scales[0] * metric, 10.0 ** scales[1] * second_moment, rank)
    assert weighted_error(metric, second_moment, *rescaled) == pytest.approx(
        error, rel=1e-7, abs=1e-12
    )


@given(data=st.data(), seed=seeds, size=sizes)
def test_bases_of_smaller_rank_are_the_first_rows(data, seed, size):
    metric, second_moment, rank = psd(seed, size), psd(seed + 1, size), draw_rank(data, size)
    _, largest = solve(metric, second_moment, size)
    assert torch.equal(solve(metric, second_moment, rank)[1], largest[:rank])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_a_moment_that_is_not_finite_is_refused(bad, position):
    moments = [psd(0, 4), psd(1, 4)]
    moments[position][2, 1] = bad
    with pytest.raises(SvdError, match="not finite"):
        solve(*moments, 2)


def test_an_indefinite_second_moment_is_refused():
    with pytest.raises(SvdError, match="not positive semidefinite"):
        solve(torch.eye(3), torch.diag(torch.tensor([3.0, 1.0, -2.0])), 3)


def statistics(heads: int, size: int) -> KVStatistics:
    def moment(seed: int) -> torch.Tensor:
        return torch.stack([psd(seed + head, size) for head in range(heads)])

    return KVStatistics("pre", moment(0), moment(10), moment(20), moment(30), tokens=1)


def projection(k_rank: int, v_rank: int, **changed: object) -> KVProjection:
    shape = {"mode": "pre", "num_kv_heads": 3, "head_dim": 8} | changed
    return KVProjection(k_rank=k_rank, v_rank=v_rank, **shape)


def test_bases_have_the_shapes_the_format_promises():
    config = projection(k_rank=5, v_rank=3)
    tensors = project(statistics(3, 8), config).tensors("layer")
    stored = {name: Stored(tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert stored == config.tensors("layer")


def test_each_head_and_each_side_is_solved_on_its_own():
    collected = statistics(3, 8)
    bases = project(collected, projection(k_rank=5, v_rank=3))
    for head in range(3):
        up, down = solve(collected.query_metric[head], collected.key_moment[head], 5)
        assert torch.equal(bases.k_up[head], up) and torch.equal(bases.k_down[head], down)
        up, down = solve(collected.output_metric[head], collected.value_moment[head], 3)
        assert torch.equal(bases.v_up[head], up) and torch.equal(bases.v_down[head], down)


def test_error_falls_with_rank_to_zero():
    collected = statistics(3, 8)
    errors = [
        kv_error(collected, project(collected, projection(rank, rank))) for rank in range(1, 9)
    ]
    for side in zip(*errors, strict=True):
        assert all(larger > smaller for larger, smaller in pairwise(side))
        assert side[0] < 1
        assert side[-1] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("changed", [{"mode": "post"}, {"num_kv_heads": 2}, {"head_dim": 16}])
def test_statistics_of_another_layer_are_refused(changed):
    with pytest.raises(SvdError, match="collect the statistics again"):
        project(statistics(3, 8), projection(4, 4, **changed))


@given(seed=st.integers(0, 99), rank=st.integers(1, 7))
def test_a_group_loses_no_more_than_its_heads_alone(seed, rank):
    """Of the same channels: the bases of single heads are one choice of those of the group."""
    joint = psd(seed, 16)
    metric = torch.block_diag(psd(seed + 100, 8), psd(seed + 200, 8))
    moment, readers = joint[None], metric[None]
    together = KVStatistics("pre", moment, readers, moment, readers, tokens=1)
    config = projection(2 * rank, 2 * rank, num_kv_heads=2, group=2)
    bases = project(together, config)
    assert {name: Stored(tuple(t.shape)) for name, t in bases.tensors("x").items()} == (
        config.tensors("x")
    )
    parts = [torch.stack([m[:8, :8], m[8:, 8:]]) for m in (joint, metric)]
    alone = KVStatistics("pre", *parts, *parts, tokens=1)
    single = project(alone, projection(rank, rank, num_kv_heads=2))
    for one, other in zip(kv_error(together, bases), kv_error(alone, single), strict=True):
        assert one <= other * (1 + 1e-9) + 1e-12
