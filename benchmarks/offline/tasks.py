"""Tasks of lm-eval, on a model that is loaded already; needs the `tasks` extra."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_svd.errors import SvdError
from vllm_svd.format import sha256

# What a task is judged by: the first of these that it reports.
_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")


class Tasks:
    """Tasks by name, of lm-eval itself or of YAML files in `directory`, `limit` documents of each.

    Raises SvdError where lm-eval is not installed or knows no such task.
    """

    def __init__(
        self, names: Iterable[str], directory: Path | None = None, limit: int | None = None
    ) -> None:
        self.names, self.limit = list(dict.fromkeys(names)), limit
        self.directory = directory
        self._manager: Any = None
        if not self.names:
            return
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SvdError(
                f"--task {self.names[0]} needs lm-eval: {error}\n"
                "Remedy: pip install 'vllm-svd[tasks]', or leave --task out"
            ) from None
        self._manager = TaskManager(include_path=None if directory is None else str(directory))
        known = set(self._manager.all_subtasks)
        if unknown := [name for name in self.names if name not in known]:
            raise SvdError(
                f"--task {', '.join(unknown)}: lm-eval has no such task\n"
                "Remedy: give single tasks, as `lm-eval ls subtasks` lists them, or --task-path "
                "with a YAML file of your own"
            )

    @property
    def facts(self) -> list[object]:
        """What scores depend on beside the model: nothing without tasks."""
        if not self.names:
            return []
        files = sorted(self.directory.rglob("*.y*ml")) if self.directory else []
        return [self.names, self.limit, version("lm-eval"), [sha256(path) for path in files]]

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int
    ) -> dict[str, float]:
        """The main metric of every task; raises SvdError for what lm-eval cannot run."""
        if not self.names:
            return {}
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=self.names,
                task_manager=self._manager,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except Exception as error:  # of lm-eval, of datasets, of the network
            raise SvdError(
                f"--task {', '.join(self.names)}: lm-eval failed: {error}\n"
                "Remedy: run the task with lm-eval itself, which says more"
            ) from None
        return {name: _main(found["results"][name]) for name in self.names}


def _main(result: dict[str, Any]) -> float:
    """Of the metrics `name,filter`, errors aside, the one that papers report; the first filter."""
    values: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, int | float) and "_stderr" not in key and "," in key:
            values.setdefault(key.partition(",")[0], value)
    for metric in _METRICS:
        if metric in values:
            return float(values[metric])
    return float(next(iter(values.values())))
