"""README.md of a compressed checkpoint: what it is, what it weighs and what it lost."""

from collections.abc import Iterable
from statistics import median

import yaml

from offline_compress.allocation import RankPlan
from offline_compress.checkpoint.measurements import Measurements
from offline_compress.recipe import CompressionRecipe


def card(plan: RankPlan, recipe: CompressionRecipe, measured: Measurements) -> str:
    """The model card, in Markdown."""
    front = yaml.safe_dump(
        {
            "base_model": measured.base_model,
            "library_name": "vllm",
            "pipeline_tag": "text-generation",
            "tags": ["vllm-svd", recipe.weights.method.name],
        }
    )
    return "\n".join(
        [
            f"---\n{front}---\n",
            f"# {measured.base_model}, compressed\n",
            "Served by stock vLLM with the vllm-svd plugin: `vllm serve <this directory>`.\n",
            *_overview(plan, measured),
            "",
            f"Perplexity is per token, over {measured.scored_tokens} scored tokens of the "
            f"{measured.held_out_tokens} at the end of `{measured.text}`, in non-overlapping "
            f"windows of {measured.context}, held out from the {measured.calibration_tokens} "
            f"tokens of calibration. SHA-256 of `{measured.text}`: `{measured.text_sha256}`.\n",
            "## Errors\n",
            *_errors(measured),
            "",
            "Errors are fractions of a squared norm, per matrix or cache. Predicted is the tail "
            "that the method dropped, in its own metric; held out is the output error of what is "
            "stored. `measurements.json` lists every one, `plan.json` every rank.\n",
            "## Recipe\n",
            f"```yaml\n{recipe.yaml()}```\n",
            "Written by " + ", ".join(f"{name} {v}" for name, v in measured.versions.items()) + ".",
            "",
        ]
    )


def _overview(plan: RankPlan, measured: Measurements) -> list[str]:
    totals = plan.totals
    return [
        "| | dense | compressed | kept |",
        "|---|---|---|---|",
        _row(
            "bytes of linear layers",
            totals.linear_bytes_dense,
            totals.linear_bytes,
            totals.linear_kept,
        ),
        _row(
            "checkpoint bytes",
            totals.checkpoint_bytes_dense,
            totals.checkpoint_bytes,
            totals.checkpoint_bytes / totals.checkpoint_bytes_dense,
        ),
        _row(
            "KV bytes per token",
            totals.kv_bytes_per_token_dense,
            totals.kv_bytes_per_token,
            totals.kv_bytes_per_token / totals.kv_bytes_per_token_dense,
        ),
        f"| perplexity | {measured.perplexity_dense:.3f} | {measured.perplexity:.3f} | |",
        f"| KL to dense, nats per token | 0 | {measured.kl_to_dense:.2e} | |",
        f"| same most likely token | 1 | {measured.top1_agreement:.3f} | |",
    ]


def _row(label: str, dense: int, compressed: int, kept: float) -> str:
    return f"| {label} | {dense:,} | {compressed:,} | {kept:.3f} |"


def _errors(measured: Measurements) -> list[str]:
    groups: dict[str, list[tuple[str, float]]] = {}
    for path, matrix in measured.matrices.items():
        name = path.rpartition(".")[2]
        groups.setdefault(f"{name}, predicted", []).append((path, matrix.predicted))
        if matrix.held_out is not None:
            groups.setdefault(f"{name}, held out", []).append((path, matrix.held_out))
    for path, cache in measured.caches.items():
        groups.setdefault("K (scores), held out", []).append((path, cache.k_error))
        groups.setdefault("V (output), held out", []).append((path, cache.v_error))
    rows = [f"| {label} | {_spread(errors)} |" for label, errors in groups.items()]
    return ["| what | median | largest | where |", "|---|---|---|---|", *rows]


def _spread(errors: Iterable[tuple[str, float]]) -> str:
    listed = list(errors)
    where, largest = max(listed, key=lambda error: error[1])
    return f"{median(error for _, error in listed):.2e} | {largest:.2e} | {where}"
