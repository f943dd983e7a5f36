"""Prompts of one length cut from real text, no two with a common beginning."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from benchmarks.serving.errors import BenchmarkError


def cut(model: Path, text: Path, count: int, length: int) -> list[str]:
    """`count` passages of `length` tokens (special tokens come on top), spread over the text.

    Every passage starts elsewhere, so that no repeat is answered from the prefix cache. Raises
    BenchmarkError where tokenizer or text cannot be read, or the text is too short.
    """
    content, encoding, starts = _spread(model, text, count, length)
    spans = encoding.offsets
    return [content[spans[start][0] : spans[start + length - 1][1]] for start in starts]


def cut_ids(model: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """The tokens of the passages that `cut` gives."""
    _, encoding, starts = _spread(model, text, count, length)
    return [encoding.ids[start : start + length] for start in starts]


def _spread(model: Path, text: Path, count: int, length: int) -> tuple[str, Encoding, list[int]]:
    """The text, its tokens, and the first token of each passage."""
    file = model / "tokenizer.json"
    if not file.is_file():
        raise BenchmarkError(
            f"{model} has no tokenizer.json.\n"
            "Remedy: save the tokenizer with tokenizer.save_pretrained of a fast tokenizer."
        )
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(
            f"--text {text} cannot be read as UTF-8 ({error}).\nRemedy: give a UTF-8 text file."
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise BenchmarkError(
            f"{file} is not a tokenizer that the tokenizers library reads ({error}).\n"
            "Remedy: copy the model's tokenizer.json again."
        ) from None
    encoding = tokenizer.encode(content, add_special_tokens=False)
    last = len(encoding.ids) - length
    if last < count:
        raise BenchmarkError(
            f"{text} has {len(encoding.ids)} tokens, too few for {count} prompts of {length} "
            "tokens.\n"
            "Remedy: a longer --text, or fewer or shorter prompts."
        )
    return content, encoding, [index * last // count for index in range(count)]


def deal(passages: list[str], repeats: int) -> Iterator[list[str]]:
    """The passages in `repeats` equal hands, each drawn from the whole text."""
    for repeat in range(repeats):
        yield passages[repeat::repeats]


def write(passages: list[str], path: Path) -> None:
    """Write the ShareGPT file that `vllm bench serve` reads."""
    turns = [
        {"conversations": [{"from": "human", "value": passage}, {"from": "gpt", "value": "."}]}
        for passage in passages
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(turns, ensure_ascii=False))
