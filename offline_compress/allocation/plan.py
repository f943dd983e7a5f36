"""RankPlan: what will be done to every matrix and every cache, before anything is computed."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from vllm_svd.format import KVProjection, Module


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MatrixPlan(_Frozen):
    """One weight [m, n]: the artefact it becomes, or the reason why it stays dense.

    `stored_bytes` is what it takes as another method quantised it; None where it is dense.
    """

    out_features: int
    in_features: int
    stored_bytes: int | None = None
    module: Module | None = None
    method: str = "dense"
    reason: str | None = None

    @property
    def rank(self) -> int | None:
        """Of a low-rank artefact."""
        return getattr(self.module, "rank", None)

    def dense_bytes(self, item_bytes: int) -> int:
        """As the source has it."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.out_features * self.in_features * item_bytes

    def bytes(self, item_bytes: int) -> int:
        """On disk, with everything that the artefact needs."""
        return self.module.bytes(item_bytes) if self.module else self.dense_bytes(item_bytes)


class CachePlan(_Frozen):
    """One attention layer; its cache stays dense, for the stated reason, without `projection`."""

    num_kv_heads: int
    head_dim: int
    projection: KVProjection | None = None
    reason: str | None = None

    def dense_bytes(self, item_bytes: int) -> int:
        """K and V of one token, over all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim * item_bytes

    def bytes(self, item_bytes: int) -> int:
        """What the cache holds of one token."""
        if self.projection is None:
            return self.dense_bytes(item_bytes)
        return self.projection.bytes_per_token(item_bytes)

    @property
    def basis_parameters(self) -> int:
        """Entries of k_down, k_up, v_down and v_up."""
        if self.projection is None:
            return 0
        return sum(math.prod(basis.shape) for basis in self.projection.tensors("").values())


class CalibrationCost(_Frozen):
    """What compressing takes, in bytes at its peak and in operations.

    On the device: `block_bytes` (a decoder block, dense and compressed), `gram_bytes` (its moments
    in fp64) and `workspace_bytes` (the largest factorisation); before or after them, where an
    allocator measures losses or factors are fine-tuned, `model_bytes` (the whole model, with what
    is trained). On the host, in memory or in a mapped file: `hidden_bytes`. In the work directory:
    `work_bytes`. Operations of model passes, in the compute dtype, and of factorisations, in fp64.
    """

    block_bytes: int
    gram_bytes: int
    workspace_bytes: int
    model_bytes: int = 0
    hidden_bytes: int
    work_bytes: int
    forward_operations: int
    factor_operations: int


class Totals(_Frozen):
    """Sums over the plan: the dense side as the source stores it, the other in the plan's dtype.

    What is copied is as the source stores it on both sides. KV bytes are of the plan's dtype.
    """

    linear_bytes_dense: int
    linear_bytes: int
    linear_kept: float
    checkpoint_bytes_dense: int
    checkpoint_bytes: int
    kv_bytes_per_token_dense: int
    kv_bytes_per_token: int


class RankPlan(_Frozen):
    """Keyed like the checkpoint's config: matrices by linear layer, caches by attention layer.

    `source_bytes` are all tensors of the dense model on disk, `copied_bytes` those copied as they
    are: embeddings, norms, biases, lm_head and the matrices that stay dense. `warnings` are one
    line each.
    """

    dtype: Literal["BF16", "F16", "F32"]
    matrices: dict[str, MatrixPlan]
    caches: dict[str, CachePlan]
    source_bytes: int
    copied_bytes: int
    calibration: CalibrationCost
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Any) -> "RankPlan":
        """From plan.json, whose totals are derived; raises pydantic's ValidationError."""
        if isinstance(raw, dict):
            raw = {name: value for name, value in raw.items() if name != "totals"}
        return cls.model_validate(raw)

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "F32" else 2

    @property
    def compressed(self) -> dict[str, Module]:
        """What the matrices that do not stay dense become."""
        return {path: plan.module for path, plan in self.matrices.items() if plan.module}

    @property
    def projected(self) -> dict[str, KVProjection]:
        """The caches that will be projected."""
        return {path: plan.projection for path, plan in self.caches.items() if plan.projection}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def totals(self) -> Totals:
        """What the checkpoint and its cache will weigh, beside the dense model."""
        item = self.item_bytes
        dense = sum(plan.dense_bytes(item) for plan in self.matrices.values())
        kept = sum(plan.bytes(item) for plan in self.matrices.values())
        made = sum(module.bytes(item) for module in self.compressed.values())
        bases = sum(plan.basis_parameters for plan in self.caches.values())
        return Totals(
            linear_bytes_dense=dense,
            linear_bytes=kept,
            linear_kept=kept / dense if dense else 1.0,
            checkpoint_bytes_dense=self.source_bytes,
            checkpoint_bytes=made + bases * item + self.copied_bytes,
            kv_bytes_per_token_dense=sum(plan.dense_bytes(item) for plan in self.caches.values()),
            kv_bytes_per_token=sum(plan.bytes(item) for plan in self.caches.values()),
        )
