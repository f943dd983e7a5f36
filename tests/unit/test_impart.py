"""ImPart: exact budgets, unbiased masks, importance, and the models it must give back exactly."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import fine_tuned, recipe_for, tensors_of
from safetensors.torch import load, save

from offline_compress.checkpoint import restore
from offline_compress.factors.delta import DeltaFactors
from offline_compress.methods.block import Block, Layer
from offline_compress.methods.impart import Impart, counts_of, kept_fractions
from offline_compress.pipeline import compress
from vllm_svd.errors import SvdError
from vllm_svd.format.delta import Delta

PATH = "model.layers.0.mlp.up_proj"


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def decaying(rows, columns, power=1.0, seed=0):
    """A matrix of singular values 1 / k^power."""
    U, _, Vt = torch.linalg.svd(random(rows, columns, seed=seed), full_matrices=False)
    return (U / torch.arange(1, len(Vt) + 1) ** power) @ Vt


def layer_of(**shapes):
    return Layer("model.layers.0", shapes, query_heads=1, kv_heads=1, head_dim=1, item_bytes=2)


def block_of(weights, base):
    layer = layer_of(**{path: tuple(weight.shape) for path, weight in weights.items()})
    return Block(layer, weights, dict.fromkeys(weights), {}, base)


def whole(rows, columns, **fields):
    """Every entry of every singular triplet."""
    rank = min(rows, columns)
    return Delta(
        out_features=rows,
        in_features=columns,
        rank=rank,
        kept_u=rows * rank,
        kept_v=columns * rank,
        **fields,
    )


def module_at(rows, columns, share, path=PATH, **options):
    method = Impart(base="base", **options)
    module = method.modules_at(layer_of(**{path: (rows, columns)}), {path: Fraction(share)})[path]
    return method, module


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    share=st.fractions(Fraction(1, 64), 1),
    bits=st.sampled_from([4, 8, 16]),
    masks=st.sampled_from(["seeded", "bitmap"]),
    preprune=st.sampled_from([0.0, 0.6, 0.9]),
    item=st.sampled_from([2, 4]),
)
def test_a_delta_fits_its_share_and_fills_it(rows, columns, share, bits, masks, preprune, item):
    """What is left over holds no entry in each factor, unless every column is whole already."""
    method = Impart(base="base", bits=bits, masks=masks, preprune=preprune)
    module = method.delta_at(rows, columns, share, item, PATH)
    budget, both, smaller = share * rows * columns * item, rows + columns, min(rows, columns)
    if share == 1:
        assert module == "kept as it is"
    elif isinstance(module, str):
        # Half of it holds no column's masks and scale, or the rest no entry of the shorter factor.
        assert f"{int(budget)} bytes" in module
        assert 8 * budget < 24 + 2 * max(both + 96, 8 * item * (both / smaller + 1))
    else:
        unused = budget - module.bytes(item)
        assert unused >= 0
        if module.kept_u + module.kept_v < both * module.rank:
            assert unused < 3 * item + 3  # two floors and a part of an entry; bytes begun


def test_keep_is_used_in_place_of_the_share():
    method, module = module_at(64, 48, "1/8", keep=0.25)
    assert module == method.delta_at(64, 48, Fraction(1, 4), 2, PATH)
    assert module_at(64, 48, "1/8", keep=1.0)[1] == "kept as it is"


def spectra():
    """Non-negative and descending, with ties, zeros and a single spike."""
    values = st.floats(0, 1e6) | st.just(0.0) | st.just(1.0)
    return st.lists(values, min_size=1, max_size=12).map(lambda found: sorted(found, reverse=True))


@given(
    values=spectra(),
    more=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    density=st.floats(0.01, 1),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 8.0]),
)
def test_counts_hit_their_sum_exactly_and_follow_importance(values, more, density, exponent):
    s = torch.tensor(values, dtype=torch.float64)
    rank, (rows, columns) = len(s), (len(s) + more[0], len(s) + more[1])
    entries = {
        "kept_u": max(1, int(density * rows * rank)),
        "kept_v": max(1, int(density * columns * rank)),
    }
    module = Delta(out_features=rows, in_features=columns, rank=rank, **entries)
    fractions = kept_fractions(s, module, exponent)
    assert (fractions.diff() <= 0).all()
    for length, kept in module.factors().values():
        counts = counts_of(fractions, length, kept)
        assert int(counts.sum()) == kept
        assert (counts.diff() <= 0).all()
        assert ((counts >= 0) & (counts <= length)).all()
        # At least what the fraction promises, so that no column is divided by zero.
        assert (counts >= (fractions * length - 1e-9).floor()).all()
        assert (counts[fractions > 0] > 0).all()


def test_probabilities_are_those_of_the_paper():
    """p = gamma (1 - (s / s_1)^C), and the tail dropped until the mean is gamma."""
    s = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
    module = Delta(out_features=1000, in_features=1000, rank=8, kept_u=4000, kept_v=4000)
    p = 1 - kept_fractions(s, module, 1.0)
    expected = 0.5 * (1 - s / 8)
    torch.testing.assert_close(p[:6], expected[:6])  # 1 + .75 + .625 + .5625 + ... <= 4
    assert (p[6:] == 1).all()
    left = 8 * 0.5 - float((1 - p).sum())
    assert 0 <= left < 1
    # C = 0 keeps whole columns: truncation.
    assert kept_fractions(s, module, 0.0).tolist() == [1.0] * 4 + [0.0] * 4


def drawn(delta, module, method, draws):
    """Differences rebuilt from as many seeds, and the expected error that each reports."""
    seeds = [module.model_copy(update={"seed": seed}) for seed in range(draws)]
    found = [method.sparsified(delta, seeded) for seeded in seeds]
    return torch.stack([factors.delta() for factors, _ in found]), {loss for _, loss in found}


def test_the_mean_over_masks_is_the_difference_itself():
    """Of the columns that stay; every entry within 5 sigma, of variances in closed form."""
    delta, draws = decaying(10, 12), 400
    module = Delta(out_features=10, in_features=12, rank=8, kept_u=48, kept_v=57)
    U, s, Vt = torch.linalg.svd(delta, full_matrices=False)
    fractions = kept_fractions(s[:8], module, 1.0)
    stays = fractions > 0
    assert (fractions[stays] < 1).any()
    U, s, Vt = U[:, :8][:, stays], s[:8][stays], Vt[:8][stays]
    counts = {k: counts_of(fractions, n, e)[stays] for k, (n, e) in module.factors().items()}
    assert counts["U"].sum() == module.kept_u  # nothing is left for the columns dropped
    assert counts["V"].sum() == module.kept_v
    inflation = 10 * 12 / (counts["U"] * counts["V"]).double()
    # u^2 v^2 (m n / (c_u c_v) - 1) of every column, whose masks are independent.
    sigma = ((U.square() * (s.square() * (inflation - 1))) @ Vt.square()).sqrt()
    found, _ = drawn(delta, module, Impart(base="base", exponent=1.0), draws)
    error = found.mean(0) - (U * s) @ Vt
    assert (error.abs() <= 5 * sigma / draws**0.5 + 1e-12).all()


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_the_loss_is_the_mean_error_over_masks(exponent):
    """Within 4 standard errors, with a column that is left too few entries where C is 0."""
    delta, draws = decaying(10, 12), 400
    module = Delta(out_features=10, in_features=12, rank=8, kept_u=25, kept_v=30)
    found, losses = drawn(delta, module, Impart(base="base", exponent=exponent), draws)
    errors = (found - delta).square().sum((1, 2)) / delta.square().sum()
    assert len(losses) == 1
    loss = losses.pop()
    assert abs(errors.mean() - loss) < 4 * errors.std() / draws**0.5
    if exponent == 0:  # no worse than the two whole columns by themselves
        squared = torch.linalg.svdvals(delta).square()
        assert loss < squared[2:].sum() / squared.sum()


def test_importance_beats_dropping_uniformly():
    """On a decaying spectrum, against DARE on the same entries of the same triplets."""
    rows, columns = 40, 32
    delta = decaying(rows, columns)
    method, module = module_at(rows, columns, "1/2", preprune=0.0)
    uniform = torch.full((module.rank,), min(module.kept_u / rows, module.kept_v / columns))
    uniform = uniform.double() / module.rank
    U, s, Vt = torch.linalg.svd(delta, full_matrices=False)
    counts = {k: counts_of(uniform, n, e) for k, (n, e) in module.factors().items()}
    ours, theirs = [], []
    for seed in range(20):
        seeded = module.model_copy(update={"seed": seed})
        ours.append((method.sparsified(delta, seeded)[0].delta() - delta).square().sum())
        rows_u = U.T * (s.sqrt() * rows / counts["U"])[:, None]
        rows_v = Vt * (s.sqrt() * columns / counts["V"])[:, None]
        dare = DeltaFactors.pack(seeded, {"U": rows_u, "V": rows_v}, counts)
        theirs.append((dare.delta() - delta).square().sum())
    assert module.kept_u + module.kept_v < (rows + columns) * module.rank
    assert max(ours) < min(theirs)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (31, 12), (5, 40)])
def test_all_of_it_restores_the_fine_tuned_weight(rows, columns):
    base = random(rows, columns)
    tuned = base + decaying(rows, columns, seed=1)
    module = whole(rows, columns)
    found = Impart(base="base").compress(block_of({PATH: tuned}, {PATH: base}), {PATH: module})
    result = found.matrices[PATH]
    torch.testing.assert_close(result.factors.dense(), tuned, rtol=0, atol=1e-12)
    assert result.loss == pytest.approx(0, abs=1e-12)


def test_keep_1_restores_the_fine_tuned_model_exactly(noisy_checkpoint, short_text, tmp_path):
    base = noisy_checkpoint("llama")
    tuned = fine_tuned(base, tmp_path / "tuned")
    options = {"name": "impart", "base": str(base), "keep": 1.0}
    measured = compress(recipe_for(short_text, options, kv=None), str(tuned), tmp_path / "out")
    assert (measured.kl_to_dense, measured.top1_agreement) == (0, 1)
    restore(tmp_path / "out", tmp_path / "restored")
    expected = tensors_of(tuned)
    for directory in ("out", "restored"):
        found = tensors_of(tmp_path / directory)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keep_1_stores_the_fine_tuned_weights_bit_for_bit():
    """And a part of the matrices as deltas leaves the others as they were."""
    names = {f"{PATH}.{i}": random(12, 8, seed=i).bfloat16() for i in range(3)}
    base = {path: (tuned + 0.01).bfloat16() for path, tuned in names.items()}
    layer = layer_of(**dict.fromkeys(names, (12, 8)))
    for keep, compressed in ((1.0, 0), (0.5, 3)):
        method = Impart(base="base", keep=keep)
        wanted = {
            path: module
            for path, module in method.modules_at(layer, dict.fromkeys(names, Fraction(1))).items()
            if isinstance(module, Delta)
        }
        made = method.compress(block_of(names, base), wanted).matrices
        assert len(made) == len(wanted) == compressed
        tensors = {f"{path}.weight": names[path] for path in names if path not in made}
        for path, result in made.items():
            tensors |= result.factors.to(torch.bfloat16).tensors(path)
        read = load(save(tensors))
        assert all(
            torch.equal(read[f"{path}.weight"], names[path]) for path in names if path not in made
        )
        dense = sum(weight.nbytes for weight in names.values())
        stored = sum(tensor.nbytes for tensor in read.values())
        assert stored == dense if keep == 1 else stored <= keep * dense


def test_results_do_not_depend_on_order_or_company():
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    delta = decaying(16, 12)
    base = {path: torch.zeros(16, 12, dtype=torch.float64) for path in paths}
    weights = dict.fromkeys(paths, delta)

    def made(order, **options):
        method = Impart(base="base", preprune=0.0, **options)
        layer = layer_of(**dict.fromkeys(order, (16, 12)))
        wanted = method.modules_at(layer, dict.fromkeys(order, Fraction(1, 2)))
        found = method.compress(block_of(weights, base), wanted).matrices
        return {path: found[path].factors.dense() for path in order}

    together = made(paths)
    for order in (paths[::-1], paths[1:2]):
        for path, dense in made(order).items():
            assert torch.equal(dense, together[path])
    others = made(paths, seed=1)
    masked = [*together.values(), *others.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(masked) for b in masked[:i])


def degenerate():
    spike = decaying(20, 16) * 1e-3
    spike[3] *= 1e6
    yield "zero", torch.zeros(20, 16, dtype=torch.float64)
    yield "rank 1", random(20, 1) @ random(1, 16)
    yield "huge row", spike
    yield "tiny", decaying(20, 16) * 1e-30
    yield (
        "one entry",
        torch.zeros(20, 16, dtype=torch.float64).index_put(
            (torch.tensor([4]), torch.tensor([5])), torch.tensor(2.0, dtype=torch.float64)
        ),
    )


@pytest.mark.parametrize(("what", "delta"), list(degenerate()))
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("share", ["1/2", "1/8"])
def test_degenerate_differences(what, delta, bits, share):
    base = random(20, 16).bfloat16()
    method, module = module_at(20, 16, share, bits=bits)
    sparse, loss = method.sparsified(delta, module)
    stored = sparse.on(base).to(torch.bfloat16)
    assert torch.isfinite(stored.dense()).all()
    assert loss == loss and loss >= -1e-9
    if what == "zero":
        assert loss == 0
        assert torch.equal(stored.dense().to(torch.bfloat16), base)
    if what in ("rank 1", "one entry") and share == "1/2":
        # The one column that matters is whole: what is left is rounding, of every factor's entry.
        step = {4: 1 / 14, 8: 1 / 254, 16: 2.0**-8}[bits]
        error = (stored.delta() - delta).norm() / delta.norm()
        assert loss == pytest.approx(0, abs=1e-9)
        assert error <= step * (20**0.5 + 16**0.5) + step**2 * (20 * 16) ** 0.5


def test_a_base_that_is_absent_or_of_another_model_is_refused():
    weights = {"a": random(6, 4), "b": random(6, 4), "c": random(6, 4)}
    wanted = dict.fromkeys(weights, whole(6, 4))
    method = Impart(base="base")
    with pytest.raises(SvdError, match=r"weights\.method\.base"):
        method.compress(block_of(weights, None), wanted)
    base = {"a": random(6, 4), "b": random(7, 4)}
    with pytest.raises(SvdError, match=r"weights\.method\.base") as refused:
        method.compress(block_of(weights, base), wanted)
    assert "b.weight: [7, 4] in the base model, here [6, 4]" in str(refused.value)
    assert "c.weight: not in the base model" in str(refused.value)
