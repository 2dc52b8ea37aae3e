"""The kinds of models that a run can train."""

from efae.config import AnyConfig, GeneratorConfig
from efae.training.tasks.task import Task
from efae.training.tasks.tokenizer import TokenizerTask


def choose_task(config: AnyConfig) -> Task:
    """Return what the configuration trains."""
    if isinstance(config, GeneratorConfig):
        # Draws pictures, with packages that a tokenizer trains without (see benchmarks/gpu).
        from efae.training.tasks.generator import GeneratorTask

        return GeneratorTask(config)
    return TokenizerTask(config)
