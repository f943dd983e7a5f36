"""Train a small model from text files, so that the laboratory needs no hub."""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offline_compress.evaluation import read_text, tokenize_file
from offline_compress.preflight import pick_device
from offline_compress.report import progress_bars
from offline_compress.staging import ensure_vacant, staged
from vllm_svd.errors import SvdError

_BOS, _EOS = "<|bos|>", "<|eos|>"
_SHAPES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}

Texts = Annotated[list[Path], typer.Option("--text", exists=True, dir_okay=False)]


def train(
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    text: Texts,
    minutes: Annotated[float, typer.Option(min=0.05, help="of training")] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    shape: Annotated[str, typer.Option(help="llama or qwen3")] = "llama",
    hidden: Annotated[int, typer.Option(min=32)] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 6,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, help="as many as heads: no grouping")] = 2,
    mlp: Annotated[int | None, typer.Option(min=32, help="default: 2.7 times hidden")] = None,
    vocabulary: Annotated[int, typer.Option(min=300)] = 4096,
    context: Annotated[int, typer.Option(min=16)] = 512,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(min=0)] = 2e-3,
    seed: int = 0,
) -> None:
    """Train a causal language model on --text (repeatable) for --minutes and write it to OUT.

    AdamW (0.9, 0.95), weight decay 0.1, a warm-up of 2 % and a cosine to a tenth over the minutes;
    windows at random offsets. The model is bf16 with a byte-level BPE of --vocabulary tokens.
    """
    try:
        ensure_vacant(out)  # before the minutes are spent
        for path in text:
            read_text(path)
        if shape not in _SHAPES or hidden % (2 * heads) or heads % kv_heads or hidden % heads:
            raise SvdError(
                f"--shape {shape} --hidden {hidden} --heads {heads} --kv-heads {kv_heads} is no "
                f"model\nRemedy: a shape of {', '.join(_SHAPES)}, heads of even size that divide "
                "hidden, and kv-heads that divide heads"
            )
        tokenizer = _tokenizer(text, vocabulary)
        tokens = torch.cat([tokenize_file(tokenizer, path) for path in text])
        if len(tokens) < 4 * context:
            raise SvdError(
                f"the text holds {len(tokens)} tokens, a window {context}\nRemedy: give more --text"
            )
        torch.manual_seed(seed)
        where = pick_device(device)
        config_class, model_class = _SHAPES[shape]
        config = config_class(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=mlp or 8 * math.ceil(2.7 * hidden / 8),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            max_position_embeddings=2 * context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        model = model_class(config).to(where)
        log = _fit(model, tokens, minutes, context, batch, lr, seed)
        with staged(out, 2 * model.num_parameters() + (1 << 20)) as directory:
            model.to(torch.bfloat16).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            facts = {"text": [path.name for path in text], "tokens": len(tokens), **log}
            (directory / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    except SvdError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    typer.echo(f"{out}: {model.num_parameters():,} parameters, last loss {log['loss']:.3f} nats")


def _tokenizer(text: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <|bos|> before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_BOS, _EOS], initial_alphabet=alphabet
    )
    backend.train([str(path) for path in text], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=_BOS, eos_token=_EOS)


def _fit(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    minutes: float,
    context: int,
    batch: int,
    lr: float,
    seed: int,
) -> dict[str, float]:
    """Train in place until the minutes are over; the schedule follows the clock."""
    device = "cuda" if model.device.type == "cuda" else "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    started, steps, smoothed, loss = time.monotonic(), 0, 0.0, 0.0
    budget = 60 * minutes
    model.train()
    with progress_bars(Console(stderr=True)) as progress:
        while (elapsed := time.monotonic() - started) < budget:
            done = elapsed / budget
            rate = lr * min(1.0, (done + 1e-3) / 0.02) * (0.55 + 0.45 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.randint(len(tokens) - context - 1, (batch,), generator=generator)
            ids = torch.stack([tokens[start : start + context] for start in starts.tolist()])
            ids[:, 0] = model.config.bos_token_id
            ids = ids.to(model.device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(input_ids=ids, use_cache=False).logits
            scores = logits[:, :-1].flatten(0, 1).float()
            nats = functional.cross_entropy(scores, ids[:, 1:].flatten())
            optimizer.zero_grad()
            nats.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps, loss = steps + 1, float(nats)
            smoothed = loss if steps == 1 else 0.95 * smoothed + 0.05 * loss
            progress("train, seconds", int(elapsed), math.ceil(budget))
        progress("train, seconds", math.ceil(budget), math.ceil(budget))
    model.eval()
    return {
        "steps": steps,
        "seconds": budget,
        "trained_tokens": steps * batch * context,
        "loss": smoothed,
    }
