"""Collectives of torch.distributed on the weight of a lazily stepped embedding (two processes)."""

import pytest
import torch

from tests.distributed.processes import run_forked
from tests.optim.lazy import collectives_worker


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    exit_codes = run_forked(collectives_worker, [(folder, 0), (folder, 1)])
    logs = [(folder / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert exit_codes == [0, 0], "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_each_collective_does_as_with_the_dense_twin(results):
    for errors in results:
        refusal = errors.pop("irecv")
        assert "Use recv" in refusal
        assert len(errors) == len(collectives_worker.WAYS) + 1
        for name, error in errors.items():
            assert error <= (0.05 if "bfloat16" in name else 3e-5), name
