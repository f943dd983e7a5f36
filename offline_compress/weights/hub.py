"""Where a MODEL argument is: a directory here, or a snapshot of a hub repository."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from offline_compress.weights.shards import INDEX, SINGLE, SourceError, indexed

# Files beside the weights that the compressed checkpoint carries as they are.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def resolve(model: str, weights: bool) -> Path:
    """The directory of MODEL; of a hub model with its weights, or config and tokenizer only.

    Raises SourceError that tells a missing directory from a model that is not on the hub, gated
    or out of reach.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as error:
        raise SourceError(
            f"MODEL {model}: {error.strerror}\nRemedy: give a directory, or a hub id"
        ) from None
    if is_file:
        raise SourceError(
            f"MODEL {model} is a file\nRemedy: give the directory that holds config.json"
        )
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    if not hub_id or model.startswith((".", "~")) or ("/" in model and path.parent.is_dir()):
        raise SourceError(
            f"MODEL {model}: no such directory\n"
            "Remedy: give a directory that holds config.json and *.safetensors, or a hub id such "
            "as Qwen/Qwen3-0.6B"
        )
    try:
        return _download(model, weights)
    except SourceError:
        raise
    except Exception as error:  # the HTTP client below the hub's has errors of its own
        raise _refusal(model, error) from None


def _download(model: str, weights: bool) -> Path:
    """Only what is read: a repository may hold its weights in several formats and precisions."""
    beside = ["*.json", *COMPANIONS]
    wanted = [*beside, SINGLE] if weights else beside
    directory = Path(snapshot_download(model, allow_patterns=wanted))
    if weights and not (directory / SINGLE).is_file() and (directory / INDEX).is_file():
        shards = sorted(set(indexed(directory).values()))
        directory = Path(snapshot_download(model, allow_patterns=[*beside, *shards]))
    return directory


def _refusal(model: str, error: Exception) -> SourceError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    said = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if isinstance(said, HfHubHTTPError) and said.response.status_code in (401, 403):
        return SourceError(
            f"MODEL {model} is no directory here, and the hub refuses access to it: {first}\n"
            "Remedy: check the name; for a gated or private model accept its licence on "
            f"https://huggingface.co/{model} and log in with `hf auth login`, or set HF_TOKEN"
        )
    return SourceError(
        f"MODEL {model} is neither a directory here nor could it be fetched from the hub: "
        f"{first}\nRemedy: check the name and the network, or give a local directory"
    )
