"""Lightning with lazy_adamw: clipping, and a checkpoint that continues along dense AdamW's path."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from finetune.errors import UserError
from finetune.integrations.lightning import ClipsRows
from finetune.optim import clip_grad_norm_

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def embedding_with_gradient(sparse):
    torch.manual_seed(0)
    module = torch.nn.Embedding(10, 4, sparse=sparse)
    (module(torch.tensor([1, 1, 7])) * 3).sum().backward()
    return module


def test_gradients_are_clipped_by_norm_and_only_where_asked():
    sparse, dense = embedding_with_gradient(True), embedding_with_gradient(False)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for nothing in (None, 0, 0.0):
        ClipsRows().configure_gradient_clipping(optimizer, nothing, "norm")
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)
    ClipsRows().configure_gradient_clipping(optimizer, 0.5)
    clip_grad_norm_(dense.parameters(), 0.5)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    assert sparse.weight.grad.to_dense().norm() == pytest.approx(0.5, rel=1e-5)


def test_clipping_by_value_is_refused():
    optimizer = torch.optim.SGD(embedding_with_gradient(True).parameters(), lr=0.1)
    with pytest.raises(UserError, match="gradient_clip_algorithm is 'value'"):
        ClipsRows().configure_gradient_clipping(optimizer, 0.5, "value")


@pytest.mark.slow
def test_a_checkpoint_goes_on_along_the_trajectory(tmp_path):
    with warnings.catch_warnings():  # Lightning's own, at import and at the start of fit
        warnings.simplefilter("ignore")
        example = runpy.run_path(str(EXAMPLE))
        weights = 1 / torch.arange(1.0, example["VOCABULARY"] + 1)
        draws = torch.multinomial(
            weights,
            30 * 8 * (example["CONTEXT"] + 1),
            True,
            generator=torch.Generator().manual_seed(3),
        )
        batches = DataLoader(
            draws.view(-1, example["CONTEXT"] + 1), batch_size=16
        )  # 15 steps an epoch

        def fit(name, epochs, checkpoint=None):
            torch.manual_seed(0)
            module = example["NextWord"](name)
            trainer = example["Trainer"](
                max_epochs=epochs,
                accelerator="cpu",
                devices=1,
                gradient_clip_val=1.0,
                enable_checkpointing=False,
                **QUIET,
            )
            trainer.fit(module, batches, ckpt_path=checkpoint)
            return trainer, module

        trainer, half = fit("lazy_adamw", 1)
        checkpoint = str(tmp_path / "half.ckpt")
        trainer.save_checkpoint(checkpoint)
        _, resumed = fit("lazy_adamw", 2, checkpoint)
        _, whole = fit("lazy_adamw", 2)
        _, dense = fit("adamw", 2)
    assert len(resumed.losses) == len(half.losses) == 15
    for other in (whole, dense):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(
                resumed.state_dict()[name], value, rtol=0, atol=2e-5, msg=name
            )
