"""The device of a run, and the probe of one that may compute wrongly."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.compute import exact
from finetune.compute.exact import float64_device
from finetune.config.loading import make_config
from finetune.display import Display
from finetune.errors import UserError
from finetune.evaluation import evaluate_loss
from finetune.models.tokenizers import pad_id
from finetune.optim.lazy.missed_steps import GaussRules, History
from finetune.recipes.build.accelerator import make_accelerator, resolve_device
from finetune.recipes.build.material import read_material
from finetune.recipes.build.parts import assemble
from finetune.training.probe import check_device
from finetune.training.vocabulary import measuring_batches

CPU, MPS = torch.device("cpu"), torch.device("mps")
NARROW = torch.device("lazy")  # there are tensors without data on it, and it needs no hardware


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


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one here")
def test_a_device_that_a_model_cannot_be_moved_to_is_refused(parts) -> None:
    with pytest.raises(UserError, match=r"^mps cannot compute this model: .*\. Set x=y$"):
        check_device(parts.language_model, first_batch(parts), MPS, key="x=y")


class NoFloat64(TorchDispatchMode):
    """Without float64 on NARROW, as on a GPU of Apple."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, torch.Tensor) and found.device.type == NARROW.type:
                assert found.dtype != torch.float64, func
        return result


def test_where_float64_is_kept() -> None:
    assert float64_device(MPS) == float64_device(CPU) == CPU
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_rows_are_made_up_on_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "WITHOUT_FLOAT64", (NARROW.type,))
    history = History((0.9, 0.999), 1e-8)
    GaussRules(history, dtype=torch.float32, device=CPU)  # looks up how many nodes there are
    with FakeTensorMode(), NoFloat64():
        rules = GaussRules(history, dtype=torch.float32, device=NARROW)
        last_step = torch.zeros(3, dtype=torch.int64, device=NARROW)
        (found,) = rules.coefficients(last_step, 3)
        for values in (found.masses, found.shifts, found.decay, found.exp_avg, found.exp_avg_sq):
            assert (values.device.type, values.dtype) == (NARROW.type, torch.float32)


class Reached(Exception):
    """The sums are complete."""


def test_a_loss_is_added_up_on_a_device_without_float64() -> None:
    def reduce(sums: torch.Tensor) -> torch.Tensor:
        assert (sums.device.type, sums.dtype) == ("cpu", torch.float64)
        raise Reached

    class Scores(torch.nn.Module):
        def forward(self, targets: torch.Tensor, reduction: str) -> torch.Tensor:
            return torch.ones(len(targets), 2, device=targets.device)

    with FakeTensorMode(), NoFloat64():
        batch: Any = {"targets": torch.ones(5, 2, dtype=torch.int64)}
        with pytest.raises(Reached):
            evaluate_loss(Scores(), [batch], num_bytes=1, device=NARROW, reduce=reduce)


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
