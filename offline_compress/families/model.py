"""What transformers leaves undone: soft caps in sdpa, and tensors that are computed, not stored."""

import torch
from transformers import PretrainedConfig, PreTrainedModel


def respect_soft_caps(model: PreTrainedModel) -> None:
    """Give a model whose attention scores have a soft cap the attention that computes it.

    transformers prefers sdpa, which has no place for one and does not say so.
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def fill_computed(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Compute what no checkpoint stores: RoPE frequencies, and the scale of embeddings, if any."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    scale = getattr(base.embed_tokens, "scalar_embed_scale", None)
    if scale is not None:
        base.embed_tokens.embed_scale = torch.tensor(scale, dtype=torch.float32, device=device)


def soft_capped(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Logits of the head as the model gives them."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
