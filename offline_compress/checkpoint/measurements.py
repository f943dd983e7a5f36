"""measurements.json: what a compressed checkpoint was measured to lose, and where it came from."""

from pydantic import BaseModel, ConfigDict

MEASUREMENTS_FILE = "measurements.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MatrixError(_Frozen):
    """Relative errors, fractions of a squared norm.

    `predicted` is the dropped tail in the metric of the method, before any fine-tuning; `held_out`
    the output error of what is stored, on text it was not computed from; None where only whole
    modules compare.
    """

    predicted: float
    held_out: float | None = None
    damping: float


class CacheError(_Frozen):
    """Held-out relative errors of the attention scores (K) and of the attention output (V)."""

    k_error: float
    v_error: float


class Measurements(_Frozen):
    """`perplexity` is per scored token: of `held_out_tokens` at the end of `text`, in windows of
    `context`, `scored_tokens` had something before them. `kl_to_dense` is in nats per token,
    `top1_agreement` the fraction of tokens with the same most likely successor.
    """

    base_model: str
    text: str
    text_sha256: str
    calibration_tokens: int
    held_out_tokens: int
    scored_tokens: int
    context: int
    perplexity_dense: float
    perplexity: float
    kl_to_dense: float
    top1_agreement: float
    matrices: dict[str, MatrixError]
    caches: dict[str, CacheError]
    versions: dict[str, str]
