"""Two ranks with different caches, one of them empty, end up launching the same configuration."""

import json
import subprocess
import sys

import pytest
from planted import entry, table

RANK = """
import json, os, sys
import torch.distributed as dist
import planted
from fastattn import distributed
from fastattn.runtime import tuning as _config
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for cache in sys.argv[3:]:
    os.environ["FASTATTN_CACHE_DIR"] = cache
    _config.install("cpu", None)
    before = planted.look_up().values["tile"]
    agreed = distributed.sync_tables()
    again = distributed.sync_tables()
    choice = planted.look_up()
    print("answer", json.dumps([before, agreed, again, choice.values["tile"], choice.source]))
dist.destroy_process_group()
"""


def test_one_rank_is_empty(tmp_path, monkeypatch, target):
    """First the second rank has no table, then the first has none: the first rank's is used both times."""
    monkeypatch.delenv("FASTATTN_CONFIG_DIR")
    full, empty = tmp_path / "full", tmp_path / "empty"
    (full / "tables").mkdir(parents=True)
    (full / "tables" / f"{target.slug}.json").write_text(json.dumps(table(target, entry(tile=128))))
    processes = []
    for rank, caches in enumerate([(full, empty), (empty, full)]):
        command = [sys.executable, "-c", RANK, str(rank), tmp_path / "meet", *caches]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        lines = [line.removeprefix("answer ") for line in out.splitlines() if line.startswith("answer ")]
        answers.append([json.loads(line) for line in lines])  # gloo of torch 2.10 prints lines of its own
        assert err.count("tuned tables differ") == (0 if len(answers) == 1 else 2)
    tuned, default = [128, False, True, 128, "synchronised"], [32, False, True, 32, "default"]
    assert answers == [[tuned, default], [[32, *tuned[1:]], [128, *default[1:]]]]


def test_needs_a_process_group():
    from fastattn import distributed

    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.sync_tables()
