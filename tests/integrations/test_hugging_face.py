"""transformers.Trainer with the factory's optimizers, against that with torch's AdamW."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from finetune.errors import UserError
from finetune.integrations.hugging_face import optimizer_factory, use_optimizer
from finetune.optim import LazyAdamW
from finetune.optim.lazy.table import stored

VOCABULARY, LENGTH = 500, 12


def tiny_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **shape))


def rows(number: int, seed: int) -> list[dict]:
    words = 1 / torch.arange(1.0, VOCABULARY + 1)
    drawn = torch.multinomial(
        words, number * LENGTH, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return [{"input_ids": row, "labels": row} for row in drawn.view(number, LENGTH)]


@pytest.fixture
def arguments(tmp_path):
    count = itertools.count()

    def arguments(**changes):
        settings = {
            "output_dir": str(tmp_path / f"run-{next(count)}"),
            "learning_rate": 1e-2,
            "weight_decay": 0.5,
            "max_grad_norm": 0.5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "log_level": "error",
        }
        return TrainingArguments(**{**settings, **changes})

    return arguments


def trainer_of(args, *, tied=False, **options) -> Trainer:
    return Trainer(
        model=tiny_model(tied),
        args=args,
        train_dataset=rows(48, 1),
        eval_dataset=rows(8, 2),
        **options,
    )


def dense_trainer(args) -> Trainer:
    """torch's AdamW over groups made by hand: matrices decay, the table and every vector do not."""
    trainer = trainer_of(args)
    decay = [
        p
        for name, p in trainer.model.named_parameters()
        if p.ndim == 2 and "embed_tokens" not in name
    ]
    others = [
        p for name, p in trainer.model.named_parameters() if p.ndim == 1 or "embed_tokens" in name
    ]
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    trainer.optimizer = torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2)
    )
    return trainer


def lazy_trainer(args, **options) -> Trainer:
    trainer = trainer_of(args)
    use_optimizer(trainer, "lazy_adamw", **options)
    return trainer


def assert_close(ours: dict, theirs: dict, atol: float = 1e-5) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_lazy_adamw_trains_as_torch_adamw(arguments, max_grad_norm):
    dense, lazy = (
        dense_trainer(arguments(max_grad_norm=max_grad_norm)),
        lazy_trainer(arguments(max_grad_norm=max_grad_norm)),
    )
    start = copy.deepcopy(dense.model.state_dict())
    for trainer in (dense, lazy):
        trainer.train()
    assert isinstance(lazy.optimizer.optimizer, LazyAdamW)
    assert len(lazy.optimizer.optimizer.registered_weights()) == 1
    norms = logged(lazy, "grad_norm")
    assert norms == pytest.approx(logged(dense, "grad_norm"), rel=1e-4)
    assert min(norms) > 0.5  # clipping did something
    table = "model.embed_tokens.weight"
    assert (
        stored(lazy.model.model.embed_tokens.weight) - dense.model.state_dict()[table]
    ).abs().max() > 1e-3  # some rows lag behind ...
    assert_close(lazy.model.state_dict(), dense.model.state_dict())  # ... and nobody sees it
    assert (start[table] - dense.model.state_dict()[table]).abs().max() > 0.05


def test_a_run_with_saving_and_evaluation_resumes_on_the_trajectory(arguments):
    regular = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    whole = lazy_trainer(arguments(**regular))
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-6"
    resumed = lazy_trainer(arguments(**regular))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12
    assert_close(resumed.model.state_dict(), whole.model.state_dict())
    assert len(logged(resumed, "eval_loss")) == 4
    assert logged(resumed, "eval_loss") == pytest.approx(logged(whole, "eval_loss"), abs=1e-5)


def test_the_saved_model_holds_the_rows_of_that_step(arguments):
    stepwise = {"save_strategy": "steps", "save_steps": 6}
    saved = {}
    for kind, trainer in (
        ("dense", dense_trainer(arguments(**stepwise))),
        ("lazy", lazy_trainer(arguments(**stepwise))),
    ):
        trainer.train()
        saved[kind] = load_file(f"{trainer.args.output_dir}/checkpoint-6/model.safetensors")
        trainer.save_model(f"{trainer.args.output_dir}/model")
        reloaded = LlamaForCausalLM.from_pretrained(f"{trainer.args.output_dir}/model")
        assert_close(reloaded.state_dict(), trainer.model.state_dict(), atol=0)
    assert_close(saved["lazy"], saved["dense"])


def test_the_best_model_comes_back_and_stays(arguments):
    every_two = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    # The highest loss counts as the best, so that what comes back is not what is there.
    trainer = lazy_trainer(
        arguments(load_best_model_at_end=True, greater_is_better=True, **every_two)
    )
    trainer.train()
    folder = trainer.state.best_model_checkpoint
    assert trainer.state.best_global_step == 2
    assert_close(trainer.model.state_dict(), load_file(f"{folder}/model.safetensors"), atol=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_training_goes_on_in_a_second_call(arguments):
    trainers = [dense_trainer(arguments(max_steps=4)), lazy_trainer(arguments(max_steps=4))]
    for trainer in trainers:
        trainer.train()
        trainer.train()
    assert_close(trainers[1].model.state_dict(), trainers[0].model.state_dict())


@pytest.mark.parametrize(
    "name", ["sgd", "Momentum", "AdaGrad", "rmsprop", "adam", "AdamW", "lion", "muon"]
)
def test_the_constructor_protocol_honours_the_arguments(arguments, name):
    args = arguments(
        max_steps=1, learning_rate=3e-3, weight_decay=0.25, lr_scheduler_type="constant"
    )
    trainer = trainer_of(args, optimizer_cls_and_kwargs=optimizer_factory(name, args))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25, 0.0}
    assert {group["optimizer"] for group in optimizer.param_groups} == {name.lower()}
    assert type(optimizer).__name__.lower() in {
        "sgd",
        "adagrad",
        "rmsprop",
        "adam",
        "adamw",
        "lion",
        "muonwithadamw",
    }


def built(name, args, **options):
    factory, settings = optimizer_factory(name, args, **options)
    return factory()(tiny_model(), **settings).defaults


def test_changed_adam_arguments_hold_and_unchanged_ones_leave_the_rule_alone(arguments):
    defaults = built("adamw", arguments(adam_beta2=0.95, adam_epsilon=1e-6))
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.95), 1e-6)
    assert built("lion", arguments())["betas"] == (0.9, 0.99)  # Lion's own
    assert built("adamw", arguments(adam_beta2=0.95), betas=(0.8, 0.9))["betas"] == (0.8, 0.9)
    with pytest.raises(UserError, match="'sgd' does not take 'betas'"):
        optimizer_factory("sgd", arguments(adam_beta2=0.95))


@pytest.mark.parametrize("through", ["use_optimizer", "the constructor"])
@pytest.mark.parametrize(
    ("argument", "value", "option", "result"),
    [
        ("learning_rate", 0.5, "lr", 0.5),
        ("weight_decay", 0.25, "weight_decay", 0.25),
        ("adam_beta2", 0.95, "betas", (0.9, 0.95)),
        ("adam_epsilon", 1e-6, "eps", 1e-6),
    ],
)
def test_arguments_are_read_when_training_starts(
    arguments, through, argument, value, option, result
):
    args = arguments(max_steps=1)
    if through == "use_optimizer":
        trainer = trainer_of(args)
        use_optimizer(trainer, "adamw")
    else:
        trainer = trainer_of(args, optimizer_cls_and_kwargs=optimizer_factory("adamw", args))
    setattr(trainer.args, argument, value)
    assert trainer.create_optimizer().defaults[option] == result


@pytest.mark.parametrize("name", ["adamw", "lazy_adamw"])
def test_a_search_tries_the_rates_that_it_reports(arguments, name):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates = [1e-5, 1e-1]

    def searcher(name, **changes):
        trainer = Trainer(
            model_init=lambda: tiny_model(),
            args=arguments(max_steps=4, **changes),
            train_dataset=rows(48, 1),
            eval_dataset=rows(8, 2),
        )
        use_optimizer(trainer, name)
        return trainer

    trainer = searcher(name)
    losses = {}

    def objective(metrics):
        losses[trainer.args.learning_rate] = metrics["eval_loss"]
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=objective,
        n_trials=len(rates),
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )
    for rate in rates:
        alone = searcher("adamw", learning_rate=rate)
        alone.train()
        assert losses[rate] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-4)
    assert abs(losses[rates[0]] - losses[rates[1]]) > 0.1


def test_what_a_trainer_already_says_is_not_said_twice(arguments):
    with pytest.raises(UserError, match=r"args\.learning_rate"):
        optimizer_factory("adamw", arguments(), lr=1e-3)
    with pytest.raises(UserError, match=r"args\.weight_decay"):
        use_optimizer(trainer_of(arguments()), "adamw", weight_decay=0.1)
    with pytest.raises(UserError, match="there is no optimizer 'adamv'"):
        use_optimizer(trainer_of(arguments()), "adamv")
    args = arguments()
    with pytest.raises(UserError, match="has an optimizer already"):
        use_optimizer(
            trainer_of(args, optimizer_cls_and_kwargs=optimizer_factory("sgd", args)), "adamw"
        )


def test_rows_through_the_constructor_are_refused_with_the_way_out(arguments):
    args = arguments()
    trainer = trainer_of(args, optimizer_cls_and_kwargs=optimizer_factory("lazy_adamw", args))
    with pytest.raises(
        UserError,
        match=r"model\.embed_tokens by row-sparse .*use_optimizer\(trainer, 'lazy_adamw'\)",
    ):
        trainer.train()
    assert type(trainer.model.model.embed_tokens) is torch.nn.Embedding
    trainer.optimizer_cls_and_kwargs = None
    use_optimizer(trainer, "lazy_adamw")
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_tied_table_has_no_rows_to_refuse(arguments):
    args = arguments(max_steps=2)
    trainer = trainer_of(
        args, tied=True, optimizer_cls_and_kwargs=optimizer_factory("lazy_adamw", args)
    )
    trainer.train()
    assert trainer.optimizer.optimizer.registered_weights() == {}


def test_sparse_gradients_of_other_makes_are_clipped_too(arguments):
    args = arguments(max_steps=3, weight_decay=0.0)
    trainer = trainer_of(args)
    trainer.model.model.embed_tokens.sparse = True
    use_optimizer(trainer, "sgd")
    trainer.train()
    other = trainer_of(arguments(max_steps=3, weight_decay=0.0))
    use_optimizer(other, "sgd")
    other.train()
    assert_close(trainer.model.state_dict(), other.model.state_dict())


def test_what_takes_tables_apart_is_refused(arguments):
    trainer = trainer_of(arguments())
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UserError, match="DeepSpeed brings an optimizer of its own"):
        use_optimizer(trainer, "adamw")
    for name, refused in (("lazy_adamw", True), ("adamw", False)):
        trainer = trainer_of(arguments())
        trainer.args._n_gpu = 2  # what transformers sets where it will use DataParallel
        use_optimizer(trainer, name)
        if refused:
            with pytest.raises(UserError, match=r"not with FSDP, DataParallel or NCCL\. Use adamw"):
                trainer.create_optimizer()
        else:
            assert type(trainer.create_optimizer()) is torch.optim.AdamW


def test_another_optimizer_s_checkpoint_is_refused(arguments):
    first = lazy_trainer(arguments(max_steps=2, save_strategy="steps", save_steps=2))
    first.train()
    second = trainer_of(arguments(max_steps=4))
    use_optimizer(second, "adamw")
    with pytest.raises(UserError, match="is of lazy_adamw, but this run uses adamw"):
        second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
