"""One budget of cache bytes over layers, sides and bits."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import recipe_for

from offline_compress import cache_evidence, pipeline, planning, reference
from offline_compress.allocation import CacheEvidence, KVBudget, lost_energy, plan_caches
from offline_compress.allocation.cache_allocator import SHAPES, spread
from offline_compress.allocation.cache_menu import latents, menu, slots
from offline_compress.checkpoint import inspect
from offline_compress.evaluation import default_bos, perplexity, tokenize_file
from offline_compress.linalg import relative_noise
from offline_compress.preflight import load_tokenizer
from offline_compress.progress import silent
from vllm_svd.format import Tier, slot_bytes

CHANNELS, ITEM = 32, 2


def falling(rate, channels=CHANNELS, total=1.0):
    spectrum = torch.logspace(0, -rate, channels, 2, dtype=torch.float64)
    return total * spectrum / spectrum.sum()


@given(rate=st.floats(0.5, 30), store=st.sampled_from(["model", "int8", "int4", "tiers"]))
def test_a_menu_is_the_front_of_all_latents(rate, store):
    energy = falling(rate)
    offers = menu(energy, store, 4, ITEM)
    sizes, losses = [o.bytes for o in offers], [o.lost for o in offers]
    assert sizes == sorted(set(sizes)) and losses == sorted(set(losses), reverse=True)
    for offer in offers:
        assert offer.bytes == offer.latent.bytes(ITEM)
        assert offer.lost == pytest.approx(lost_energy(energy, *offer.latent), abs=1e-12)
    every = [(latent.bytes(ITEM), lost_energy(energy, *latent)) for latent in menu_input(store)]
    for size, lost in every:
        best = min(o.lost for o in offers if o.bytes <= size)
        assert best <= lost + 1e-12


def menu_input(store):
    return latents(CHANNELS, store, 4)


@given(
    rates=st.tuples(st.floats(0.5, 30), st.floats(0.5, 30)),
    store=st.sampled_from(["model", "tiers"]),
)
def test_slots_are_the_front_of_all_pairs_in_whole_words(rates, store):
    keys, values = (menu(falling(rate), store, 4, ITEM) for rate in rates)
    found = slots(keys, values)
    losses = [slot.lost for slot in found]
    assert losses == sorted(set(losses), reverse=True)
    for slot in found:
        assert slot.bytes == cost([(slot.key, slot.value)])
        assert store == "model" or slot.bytes % 4 == 0
    for key, value in product(keys, values):
        within = cost([(key.latent, value.latent)])
        assert min(s.lost for s in found if s.bytes <= within) <= key.lost + value.lost


def test_lost_energy_is_what_is_dropped_and_the_noise_of_what_is_kept():
    energy = falling(8)
    tiers = (Tier(channels=4, store="int8"), Tier(channels=8, store="int2"))
    expected = float(energy[12:].sum())
    expected += relative_noise("int8", 4) * 4 * float(energy[:4].sqrt().mean() ** 2)
    expected += relative_noise("int2", 8) * 8 * float(energy[4:12].sqrt().mean() ** 2)
    assert lost_energy(energy, 12, tiers) == pytest.approx(expected)
    assert lost_energy(energy, CHANNELS) == 0
    both = torch.stack([energy, falling(1)])  # groups that are cut alike lose each its own
    alone = sum(lost_energy(one, 12, tiers) for one in both)
    assert lost_energy(both, 12, tiers) == pytest.approx(alone)
    assert lost_energy(both.sum(0), 12, tiers) > alone


def test_the_coarsest_steps_of_wide_latents_are_few_enough_to_try():
    assert sum(1 for _ in latents(4096, "tiers", 8)) < 10_000
    widths = {tier.channels for latent in latents(4096, "tiers", 8) for tier in latent.tiers}
    assert min(widths) == 128


def layers_of(*totals):
    """Keys fall faster than values; later layers hold more."""
    return [(falling(12, total=total)[None], falling(6, total=total)[None]) for total in totals]


def cost(found):
    """Of slots, which are whole words where latents are in tiers."""
    return sum(
        slot_bytes((*key.tiers, *value.tiers)) or key.bytes(ITEM) + value.bytes(ITEM)
        for key, value in found
    )


@given(
    exchange=st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=7
    ),
    kept=st.floats(0.05, 0.9),
    store=st.sampled_from(["model", "int4", "tiers"]),
)
def test_the_budget_is_kept_nearly_spent_and_pages_have_few_shapes(exchange, kept, store):
    evidence = CacheEvidence(layers_of(*range(1, len(exchange) + 1)), exchange)
    budget = KVBudget(kept=kept, store=store, allocator="measured", rank_multiple=4)
    size = kept * CHANNELS * ITEM
    found = spread(evidence, budget, (size, size), ITEM)
    total = 2 * size * len(exchange)
    smallest = 2 * len(exchange) * {"model": 8, "int4": 4, "tiers": 4}[store]
    largest = 2 * len(exchange) * CHANNELS * {"model": 2, "int4": 0.5, "tiers": 1}[store]
    assert cost(found) <= max(total, smallest)
    assert len(set(found)) <= SHAPES
    # what is left would not raise the largest cluster by one step
    assert cost(found) >= min(total, largest) - 2 * 8 * len(exchange)


def test_greedy_is_as_good_as_every_other_choice_up_to_a_step():
    exchange = [(1.0, 8.0), (30.0, 0.5)]
    energies = layers_of(1, 2)
    budget = KVBudget(kept=0.3, store="int4", allocator="measured", rank_multiple=4)
    size = 0.3 * CHANNELS * ITEM

    def damage(found):
        return sum(
            rate * lost_energy(energy, *latent)
            for pair, rates, of_layer in zip(found, exchange, energies, strict=True)
            for latent, rate, energy in zip(pair, rates, of_layer, strict=True)
        )

    found = spread(CacheEvidence(energies, exchange), budget, (size, size), ITEM)
    every = list(latents(CHANNELS, "int4", 4))
    best = min(
        damage([(a, b), (c, d)])
        for a, b, c, d in product(every, repeat=4)
        if cost([(a, b), (c, d)]) <= 4 * size
    )
    smaller = min(
        damage([(a, b), (c, d)])
        for a, b, c, d in product(every, repeat=4)
        if cost([(a, b), (c, d)]) <= 4 * size - 4
    )
    assert best <= damage(found) <= smaller


def test_bytes_go_where_the_probe_said_they_matter():
    energies = layers_of(1, 1)
    budget = KVBudget(kept=0.2, store="tiers", allocator="measured", rank_multiple=4)
    first, second = spread(CacheEvidence(energies, [(1, 1), (50, 1)]), budget, (13, 13), ITEM)
    assert second[0].bytes(ITEM) > first[0].bytes(ITEM)
    assert second[1] == first[1] or abs(second[1].bytes(ITEM) - first[1].bytes(ITEM)) <= 4


def test_uniform_tiers_cut_all_layers_alike_and_values_get_what_keys_leave():
    budget = KVBudget(kept=0.25, store="tiers", rank_multiple=4)
    evidence = CacheEvidence(layers_of(1, 100, 10))
    found = spread(evidence, budget, (16, 12), ITEM)
    assert len(set(found)) == 1
    assert 13 <= found[0][0].bytes(ITEM) <= 16
    assert 24 <= cost(found[:1]) <= 16 + 12
    assert len(found[0][0].tiers) > 1
    alone = KVBudget(k_kept=1, v_kept=0.2, kept=0.5, store="tiers", rank_multiple=4)
    (key, value), *_ = spread(evidence, alone, (64, 12), ITEM)
    assert cost([(key, value)]) <= key.bytes(ITEM) + 12


@pytest.mark.parametrize(
    ("store", "kept", "rank"),
    # bytes of 64 channels in 16 bits, less half a word: 30, 14 and 126 (capped by the channels)
    [("int8", 0.25, 24), ("int4", 0.125, 24), ("fp8_e4m3", 1, 64), ("int4", 0.001, 8)],
)
def test_one_store_for_all_takes_what_fits(store, kept, rank):
    plans = plan_caches(["a", "b"], 2, 64, KVBudget(kept=kept, store=store), 2)
    for plan in plans.values():
        assert plan.projection.k_tiers == (Tier(channels=rank, store=store),)
        assert plan.projection.v_rank == rank
        assert plan.bytes(2) <= max(kept * plan.dense_bytes(2), 2 * (2 * 8 // 2 + 4))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"store": "int4", "rank_multiple": 6}, "kv.rank_multiple: 6 was given"),
        ({"store": "int8", "kept": None, "k_kept": 0.5}, "kv.kept is null"),
        ({"store": "tiers", "layers": {0: {"k_rank": 8}}}, "ranks are measured"),
        ({"allocator": "measured", "k_kept": 0.5}, "divides kv.kept itself"),
        ({"allocator": "measured", "kept": None, "v_kept": 0.5}, "it needs a budget"),
        ({"store": "int4", "layers": {0: {"k_rank": 6}}}, "multiples of 4"),
        ({"store": "int8", "rank_multiple": 72}, "a latent has 64 channels at most"),
        ({"allocator": "measured", "rank_multiple": 72}, "64 channels at most"),
    ],
)
def test_contradictions_are_named(budget, said):
    found = KVBudget.model_validate(budget).problems(2, 2, 64)
    assert any(said in problem for problem in found)


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_run_spends_its_budget_and_reloads_as_measured(
    tiny_checkpoint, short_text, tmp_path, mode, family
):
    """fp32: the plan before says so; the plan after holds what was decided."""
    cache = {"kept": 0.1, "store": "tiers", "allocator": "measured", "mode": mode, "group": 2}
    recipe = recipe_for(short_text, kept=1, kv=cache | {"rank_multiple": 4})
    model = tiny_checkpoint(family)
    pipeline.compress(recipe, str(model), tmp_path / "out")
    found = inspect(tmp_path / "out")
    totals = found.plan.totals
    assert 0.09 < totals.kv_bytes_per_token / totals.kv_bytes_per_token_dense <= 0.1
    assert all(projection.k_tiers for projection in found.plan.projected.values())
    loaded = reference.load(tmp_path / "out", "cpu", torch.float32)
    tokenizer = load_tokenizer(model)
    tokens = tokenize_file(tokenizer, short_text)[:640]
    dense = reference.load(model, "cpu", torch.float32)
    scores = [perplexity(m, tokens, 64, 4, default_bos(tokenizer)) for m in (dense, loaded)]
    assert scores[0].nll != scores[1].nll
    assert found.measured.perplexity == pytest.approx(found.measured.perplexity_dense, rel=0.2)


@torch.no_grad()
def test_probes_are_compared_by_the_logits_of_the_model(
    noisy_checkpoint, network_of, streams_of, monkeypatch
):
    """Of a head with a soft cap, too."""
    heads = []
    monkeypatch.setattr(cache_evidence, "divergence", lambda head, _: heads.append(head) or 1.0)
    directory = noisy_checkpoint("gemma2")
    network, windows = network_of(directory), torch.arange(96).view(4, 24)
    recipe = recipe_for("text", kept=1, kv={"kept": 0.1, "allocator": "measured"})
    layers, streams = planning.layers_of(network.source), streams_of(network, windows)
    cache_evidence.gather(recipe, network, layers, streams, windows, silent)
    model = reference.load(directory, "cpu", torch.float32)
    hidden = model.base_model(windows).last_hidden_state
    assert len(heads) == 4
    assert torch.equal(heads[0](hidden), model(windows).logits)
