"""The device of a run, and the probe of one that may compute wrongly."""

from typing import Any

import pytest
import torch

from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.models.tokenizers import pad_id
from finetune.recipes.build.accelerator import make_accelerator, resolve_device
from finetune.recipes.build.material import read_material
from finetune.recipes.build.parts import assemble
from finetune.training.probe import check_device
from finetune.training.vocabulary import measuring_batches

CPU = torch.device("cpu")


@pytest.fixture(params=["full", "active", "sampled"])
def parts(request: pytest.FixtureRequest, tiny) -> Any:
    config, quiet = make_config(tiny(vocabulary={"mode": request.param})), Display(enabled=False)
    material = read_material(config, quiet)
    return assemble(material, accelerator=make_accelerator(config, quiet), display=quiet)


def first_batch(parts: Any) -> Any:
    material = parts.material
    return next(measuring_batches(material.train, pad_id=pad_id(material.tokenizer)))


def test_a_device_that_computes_alike_passes(parts) -> None:
    parts.language_model.train()
    check_device(parts.language_model, first_batch(parts), CPU, key="x=y")
    assert parts.language_model.training
    assert all(weight.grad is None for weight in parts.model.parameters())


@pytest.mark.parametrize(("wrong", "what"), [("loss", "loss"), ("gradient", "gradients")])
def test_a_device_that_computes_wrongly_is_refused(parts, wrong: str, what: str) -> None:
    """What is computed after the move is off by a hundredth."""
    module, moved = parts.language_model, []
    to, forward = module.to, module.forward

    def move(*arguments: Any) -> Any:
        moved.append(True)
        return to(*arguments)

    def compute(**batch: Any) -> torch.Tensor:
        loss = forward(**batch)
        if not moved:
            return loss
        return loss * 1.01 if wrong == "loss" else loss + 0.01 * (loss - loss.detach())

    module.to, module.forward = move, compute
    with pytest.raises(UserError, match=f"wrongly: on a small batch its {what} differ .* Set x=y"):
        check_device(module, first_batch(parts), CPU, key="x=y")


def test_a_device_that_lacks_an_operation_is_refused(parts) -> None:
    module, calls, forward = parts.language_model, [], parts.language_model.forward

    def compute(**batch: Any) -> torch.Tensor:
        calls.append(True)
        if len(calls) > 1:
            raise NotImplementedError("no kernel\nat length")
        return forward(**batch)

    module.forward = compute
    with pytest.raises(UserError, match=r"cpu cannot compute this model: no kernel\. Set x=y"):
        check_device(module, first_batch(parts), CPU, key="x=y")


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("mps", [False, True])
def test_auto_takes_cuda_and_never_a_macs_gpu(
    cuda: bool, mps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == ("cuda" if cuda else "cpu")
    assert resolve_device("cpu") == "cpu"
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert resolve_device(name) == name
        else:
            with pytest.raises(UserError, match=f"training.device is {name}, which torch does"):
                resolve_device(name)
