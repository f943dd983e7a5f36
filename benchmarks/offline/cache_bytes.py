"""Where a budget of K/V bytes went: those of one token, by layer, keys and values, and store."""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from offline_compress.allocation import CachePlan, RankPlan
from vllm_svd.format import STORES, Side

matplotlib.use("Agg")
from matplotlib import pyplot

_FILL = "fill"
_PARTS = ("model's dtype", *STORES, _FILL)
_COLOURS = dict(zip(_PARTS, ("C7", "C4", "C0", "C1", "C2", "C3"), strict=True))


def cache_bytes(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(dir_okay=False, help="PNG")],
) -> None:
    """Draw bytes by layer of the K/V cache of a compressed checkpoint."""
    file = checkpoint / "plan.json"
    try:
        plan = RankPlan.parse(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{file} cannot be read ({error}); give a directory that offline-compress wrote",
            param_hint="CHECKPOINT",
        ) from None
    draw(plan, out)
    typer.echo(str(out))


def draw(plan: RankPlan, out: Path) -> None:
    """Two bars a layer, keys and values."""
    figure, axes = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    drawn: set[str] = set()
    sides: tuple[tuple[float, Side], ...] = ((-0.2, "key"), (0.2, "value"))
    for layer, cache in enumerate(plan.caches.values()):
        for beside, side in sides:
            below, place = 0, layer + beside
            for name, size in side_bytes(cache, side, plan.item_bytes).items():
                label = name if name not in drawn else None
                axes.bar(place, size, 0.36, below, color=_COLOURS[name], label=label)
                drawn.add(name)
                below += size
            axes.text(place, below, side[0], ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(plan.caches)))
    axes.set_xlabel("layer")
    totals = plan.totals
    axes.set_title(f"{totals.kv_bytes_per_token:,} of {totals.kv_bytes_per_token_dense:,} bytes")
    axes.set_ylabel("bytes of a token")
    axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def side_bytes(cache: CachePlan, side: Side, item_bytes: int) -> dict[str, int]:
    """Bytes of one token over all KV heads, by what they are stored as.

    What fills slots up counts to the values, as in the plan.
    """
    projection = cache.projection
    if projection is None:
        return {_PARTS[0]: cache.dense_bytes(item_bytes) // 2}
    rank, tiers = projection.latent(side)
    stored: dict[str, int] = {tier.store: tier.bytes for tier in tiers}
    stored = stored or {_PARTS[0]: rank * item_bytes}
    fill = projection.slot_shares(item_bytes)[side == "value"] - sum(stored.values())
    stored |= {_FILL: fill} if fill else {}
    return {name: projection.groups * size for name, size in stored.items()}
