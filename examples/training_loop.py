"""A whole run in one flat file, with a loop to change: from a config to a trained model.

python examples/training_loop.py CONFIG [KEY=VALUE ...]; prints one JSON line a step, then the
evaluation. The losses are those of `finetune train` with the same config. That command also writes
checkpoints and records, evaluates between the steps, and stops on a signal or a diverging loss.
"""

import json
import sys
from pathlib import Path

import torch

from finetune import RunConfig, load_config
from finetune.display import Display
from finetune.distributed.engines import prepare
from finetune.models.export import export_model
from finetune.recipes.build.accelerator import make_accelerator
from finetune.recipes.build.evaluator import evaluator_of
from finetune.recipes.build.material import read_material
from finetune.recipes.build.optimizer import make_optimizer, make_scheduler
from finetune.recipes.build.parts import assemble
from finetune.training.step import take_step
from finetune.training.trainer import step_seed


def train(config: RunConfig) -> None:
    display = Display()
    accelerator = make_accelerator(config, display)  # device, precision
    material = read_material(config, display)  # records, tokenizer, encoded data; no weights
    parts = assemble(material, accelerator=accelerator, display=display)  # model, batches
    optimizer = make_optimizer(parts.model, config)
    scheduler = make_scheduler(optimizer, config, parts.num_steps)
    module, optimizer, average_rows = prepare(accelerator, parts.language_model, optimizer, display)

    batches = iter(parts.batches)  # endless: the data in a new order for each epoch
    for step in range(parts.num_steps):
        batch = next(batches)
        torch.manual_seed(step_seed(config.seed, step, accelerator.process_index))  # of dropout
        parts.vocabulary.before_step(step, batch)  # draws frozen rows, if the mode is `sampled`
        result = take_step(  # calls module(**micro_batch): a loss of your own is another module
            module,
            optimizer,
            batch,
            accelerator=accelerator,
            max_grad_norm=config.training.max_grad_norm,
            average_rows=average_rows,
        )
        print(json.dumps({"step": step + 1, "loss": result.loss, "lr": scheduler.get_last_lr()[0]}))
        if not result.skipped:
            scheduler.step()

    optimizer.eval()  # schedule-free optimizers are evaluated at another point
    metrics, answers = evaluator_of(parts).evaluate()
    print(json.dumps({"metrics": metrics, "answers": answers}))
    export_model(parts.model, material.tokenizer, config.output_dir / "model", card="A first try.")


if __name__ == "__main__":
    train(load_config(Path(sys.argv[1]), sys.argv[2:]))
