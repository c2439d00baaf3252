"""What `solve` and `evaluate` do with ARC's tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fastattn.models import Hrm
    from fastattn.train.data.arc import Task, Votes

BATCH = 64  # images at a time


def counted(votes: "Votes") -> "Callable[[dict[str, Tensor], Tensor, Tensor], None]":
    """Counts the answers of a batch."""

    def seen(batch: "dict[str, Tensor]", tokens: "Tensor", q_halt: "Tensor") -> None:
        votes.add(
            batch["puzzle_ids"].tolist(),
            batch["inputs"].numpy(),
            tokens.numpy(),
            q_halt.double().sigmoid().tolist(),
        )

    return seen


def score(votes: "Votes") -> str:
    """Lines of pass@k."""
    tasks = votes.asked()
    if not tasks:
        return "ARC: no test with a known output was solved"
    tests = sum(len(votes.tests[name]) for name in tasks)
    lines = [f"ARC: {len(tasks):,} tasks, {tests:,} tests"]
    for k, (share, whole) in votes.pass_at().items():
        lines.append(f"pass@{k}: {share:.2%} of tests; tasks with all tests right {whole:.2%}")
    return "\n".join(lines)


def task_of(text: str, data: Path) -> "Task":
    """A task by its name in the folder's held-out set, or of a file, @FILE."""
    from fastattn.runtime.files import read_json
    from fastattn.train.data import arc
    from fastattn.train.data.arc_folder import read_votes

    if text.startswith("@"):
        tasks = arc.read_tasks([text[1:]])
        if len(tasks) != 1:
            raise ValueError(f"{text[1:]}: holds {len(tasks)} tasks; one is needed")
        return tasks[0]
    votes = read_votes(data)
    name = text.strip()
    if votes is None or name not in votes.tests:
        raise ValueError(f"puzzle: {name!r} is no held-out task of {data}; give its name, or @FILE")
    path = data / arc.TESTS
    if path.is_file():
        return arc.as_task(read_json(path)[name], name, "test", f"{path}: {name}")
    return arc.Task(name, "test", [], votes.tests[name])


def solve(net: "Hrm", text: str, data: Path, segments: int, augmentations: int | None) -> None:
    """Prints the two best answers to each test of a task, and where its outputs are known pass@k."""
    import numpy as np
    import torch

    from fastattn.runtime.files import read_json
    from fastattn.train.data import arc
    from fastattn.train.data.arc_folder import task_images

    path = data / arc.IDENTIFIERS
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: a list of names is needed")
    task = task_of(text, data)
    images = task_images(names, task.name)
    if not images:
        raise ValueError(f"puzzle: the model has no vector for task {task.name!r}; {path} does not name it")
    if len(names) != net.config.num_puzzles:
        raise ValueError(f"{path}: names {len(names)} puzzles; the model has {net.config.num_puzzles}")
    side = round(net.config.seq_len**0.5)
    if task.side > side:
        raise ValueError(f"puzzle: has a grid of {task.side} cells a side; this model's are {side}")
    if augmentations is not None:
        images = dict(list(images.items())[: augmentations + 1])
    votes = arc.Votes(names, {task.name: task.test})
    seen = counted(votes)
    given = [
        (number, arc.to_tokens(image.of(grid), side))
        for number, image in images.items()
        for grid, _ in task.test
    ]
    for start in range(0, len(given), BATCH):
        ids, inputs = zip(*given[start : start + BATCH], strict=True)
        batch = {
            "puzzle_ids": torch.tensor(ids),
            "inputs": torch.from_numpy(np.stack(inputs).astype(np.int64)),
        }
        *_, (tokens, q_halt) = net.solve(batch["inputs"], batch["puzzle_ids"], segments=segments)
        seen(batch, tokens, q_halt)
    for number, (grid, _) in enumerate(task.test, 1):
        print(f"test {number}\n{arc.draw(grid)}")
        ranking = votes.ranking(task.name, grid)
        for attempt, (answer, count, sure) in enumerate(ranking[:2], 1):
            print(f"answer {attempt}: {count} of {len(images)} images, sure {sure:.2f}\n{arc.draw(answer)}")
        if not ranking:
            print("no answer is a grid")
    if votes.asked():
        print(score(votes))
