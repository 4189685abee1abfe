"""Row-sparse gradients under an Accelerator: clipping, saving and loading of the whole state."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.torch_version import TorchVersion

from finetune.integrations.accelerate import clip_rows
from finetune.optim import build_optimizer

ROWS, WIDTH = 60, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids)).square().sum()


def prepared(name="lazy_adamw", seed=0):
    torch.manual_seed(seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's may hold a GPU
    model, accelerator = Model(), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, name, lr=0.05))
    return accelerator, model, optimizer


def run(accelerator, model, optimizer, steps, max_norm=0.5):
    """Take steps and return the norms before clipping.

    Each step uses 4 of the rows, some twice, in two backward passes.
    """
    norms = []
    for step in steps:
        ids = torch.randint(ROWS, (2, 4), generator=torch.Generator().manual_seed(step))
        for micro_batch in (ids[0], torch.cat([ids[1], ids[0][:2]])):
            accelerator.backward(model(micro_batch))
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def assert_close(model, other):
    for (name, ours), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(
    TorchVersion(torch.__version__) >= "2.14", reason="torch itself clips them from 2.14 on"
)
def test_accelerate_alone_refuses_sparse_gradients():
    with pytest.raises(
        NotImplementedError, match="Sparse"
    ):  # should this pass one day, clip_rows has had its time
        run(*prepared(), range(1))


@pytest.mark.parametrize("max_norm", [0.5, float("inf")])
def test_lazy_adamw_clips_and_trains_as_adamw(max_norm):
    (accelerator, lazy, optimizer), dense = prepared(), prepared("adamw")
    clip_rows(accelerator)
    norms = run(accelerator, lazy, optimizer, range(30), max_norm)
    assert norms == pytest.approx(run(*dense, range(30), max_norm), rel=1e-4)
    assert max(norms) > 0.5
    assert_close(lazy, dense[1])


def test_dense_gradients_take_accelerates_own_way():
    accelerator, model, optimizer = prepared("adamw")
    calls, original = [], accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = lambda *given: (calls.append(given), original(*given))[1]
    clip_rows(accelerator)
    run(accelerator, model, optimizer, range(3))
    assert len(calls) == 3


def test_a_second_call_changes_nothing():
    accelerator, _, _ = prepared()
    clip_rows(accelerator)
    clip = accelerator.clip_grad_norm_
    clip_rows(accelerator)
    assert accelerator.clip_grad_norm_ is clip


def test_a_saved_state_goes_on_along_the_trajectory(tmp_path):
    accelerator, model, optimizer = prepared()
    clip_rows(accelerator)
    run(accelerator, model, optimizer, range(15))
    accelerator.save_state(str(tmp_path))
    run(accelerator, model, optimizer, range(15, 30))
    again, resumed, its_optimizer = prepared(seed=7)
    clip_rows(again)
    again.load_state(str(tmp_path))
    run(again, resumed, its_optimizer, range(15, 30))
    assert_close(resumed, model)
