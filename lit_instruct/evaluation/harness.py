"""EleutherAI's lm-evaluation-harness on a model as it stands here: a checkpoint needs no export first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_instruct.evaluation.bootstrap import Interval
from lit_instruct.evaluation.protocols import EVERYTHING, Measures, Protocol
from lit_instruct.evaluation.subjects import Subject
from lit_instruct.types import ConfigError

_NORMAL_95 = 1.959964


class Harness(Protocol):
    """Public tasks by the lm-evaluation-harness (extra ``lm-eval``), for the alignment tax.

    The interval is the harness's standard error times 1.96; metrics without one have an interval of no width. Tasks
    that the harness knows by name are downloaded by it; task files of one's own need no network.
    """

    def __init__(
        self,
        tasks: list[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
        batch_size: int = 8,
    ):
        """Find the harness and the tasks.

        Args:
            tasks: names of tasks or groups.
            include_path: folder with task files (YAML) of your own.
            num_fewshot: examples before each question; null: as the task has it.
            limit: take only so many questions of each task; null: all.
            apply_chat_template: ask through the model's template.
            batch_size: rows a forward pass.
        """
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"Harness include_path: there is no folder {include_path!r}. Do: check the path.")
        if not tasks:
            raise ConfigError("Harness tasks: got none; need one or more names of tasks. Do: see `lm-eval ls tasks`.")
        self.tasks = tasks
        self.manager = _find_tasks(tasks, include_path)
        self.num_fewshot, self.limit = num_fewshot, limit
        self.apply_chat_template, self.batch_size = apply_chat_template, batch_size

    def measure(self, subject: Subject, folder: Path) -> Measures:
        """Run the tasks.

        Args:
            subject: the model.
            folder: not needed.

        Returns:
            ``TASK/METRIC``, in the condition ``all``.
        """
        found = self._run(subject)
        return {
            f"{task}/{metric}": {EVERYTHING: _interval(values, metric, counts=found["n-samples"].get(task))}
            for task, values in found["results"].items()
            for metric in _metrics(values)
        }

    def model(self, subject: Subject) -> Any:
        """The model as the harness runs it: its own adapter of Hugging Face models, around the loaded model.

        Args:
            subject: the model.

        Returns:
            An ``lm_eval.api.model.LM``.
        """
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=self.batch_size)

    def _run(self, subject: Subject) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        return simple_evaluate(
            model=self.model(subject),
            tasks=self.tasks,
            task_manager=self.manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            log_samples=False,
            bootstrap_iters=1000,
        )


def _find_tasks(names: list[str], include_path: str | None) -> Any:
    """The harness's manager of tasks; its own thousands of files are read only where others do not suffice."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "Harness: the lm-evaluation-harness is not installed. Do: pip install 'lit-instruct[lm-eval]'"
        ) from error
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"Harness tasks: got {name!r}, which the harness does not know; need the name of a task. Do: see "
                "`lm-eval ls tasks`, or give the folder of its file (include_path)."
            )
    return manager


def _metrics(values: dict[str, Any]) -> list[str]:
    """Names of a task's metrics, such as ``acc,none``; beside them stand their errors and the task's alias."""
    return [
        name
        for name, value in values.items()
        if "_stderr" not in name and isinstance(value, int | float) and "," in name
    ]


def _interval(values: dict[str, Any], metric: str, *, counts: dict[str, int] | None) -> Interval:
    name, _, kind = metric.partition(",")
    error = values.get(f"{name}_stderr,{kind}")
    width = _NORMAL_95 * error if isinstance(error, int | float) else 0.0
    mean = float(values[metric])
    return Interval(mean, mean - width, mean + width, (counts or {}).get("effective", 0))
