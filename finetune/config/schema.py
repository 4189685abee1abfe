"""The configuration: one YAML file, one frozen tree, and every default with its unit.

No room below this one knows the config. `finetune.recipes` is its only reader.
"""

import math
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    model_validator,
)

MOST = 1_000_000_000  # of any count
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
TokenCount = Annotated[int, Field(ge=1, le=1 << 24)]
Seconds = Annotated[int, Field(ge=1, le=10_000_000)]
SeedNumber = Annotated[int, Field(ge=0, lt=1 << 32)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0, le=1000)]


def expand(path: str) -> str:
    """Return a path with ~ and an environment variable at its start written out.

    Raises ValueError if the variable is not set.
    """
    found = re.match(r"\$(?:(\w+)|\{(\w+)\})(?=/|$)", path)
    if found and (found[1] or found[2]) not in os.environ:
        raise ValueError(
            f"the path {path!r} begins with an environment variable that is not set. "
            "Set it, or write the path out"
        )
    return os.path.expanduser(os.path.expandvars(path) if found else path)


PathText = Annotated[str, AfterValidator(expand)]
"""A path, or a name that may be one."""


class Section(BaseModel):
    """A frozen section in which an unknown key, and a number that is not finite, is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class LoraSection(Section):
    """Low-rank adapters through peft (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 16
    alpha: float = 32.0
    dropout: Fraction = 0.0  # on a CPU, drawing the masks takes up to a third of a step's time
    target_modules: str | tuple[str, ...] = "all-linear"


class NewTokenizerSection(Section):
    """A byte-level BPE tokenizer, trained on the run's training data, for `model.config`."""

    vocab_size: TokenCount = 1024  # tokens


class ModelSection(Section):
    """Which model: `name` (pretrained) or `config` (random weights)."""

    # A hub name, a folder, a .gguf file, or package:NAME for a pip package that ships a .gguf.
    name: PathText | None = None
    # A random model without a download, e.g. {model_type: llama, hidden_size: 64, ...}.
    config: dict[str, Any] | None = None
    tokenizer: NewTokenizerSection | None = None  # with `config` only; None: its defaults
    revision: str | None = None  # hub branch, tag or commit
    trust_remote_code: bool = False  # True: run the Python code that comes with the model
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    chat_template: PathText | None = None  # "chatml" or a Jinja file; None: the tokenizer's own
    lora: LoraSection | None = None  # None: no adapters, the model's own weights train

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if (self.name is None) == (self.config is None):
            both = "model.name and model.config are both given"
            neither = "neither model.name nor model.config is given"
            raise ValueError(
                f"{neither if self.name is None else both}. "
                "Give the name of a pretrained model, or the config of a random one"
            )
        return self


class SourceSection(Section):
    """One source of records. Written as a plain string, it is the `path`."""

    # A hub name, package:NAME for the demo data, or a local file, folder or glob. A file ends in
    # .json, .jsonl, .csv, .tsv, .parquet or .txt.
    path: PathText
    name: str | None = None  # the hub dataset's configuration, e.g. "en-fr"
    split: str = "train"
    revision: str | None = None  # hub branch, tag or commit
    target_path: PathText | None = None  # the second of two aligned text files (translation)
    # This source's share of a mix. None for all sources: every record once.
    weight: Annotated[float, Field(gt=0, le=MOST)] | None = None
    max_records: PositiveInt | None = None  # read at most this many, from the start


def _as_sources(value: Any, info: ValidationInfo) -> Any:
    """Return the sources as mappings: one path or one mapping is a list of one."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        leave_out = "" if info.field_name == "train" else ", or leave the key out"
        raise ValueError(
            f"data.{info.field_name} is an empty list. Name a file or a dataset{leave_out}"
        )
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_as_sources)]


class TranslationSection(Section):
    """How a pair of sentences becomes a prompt and an answer."""

    # The key in `translation`, or the column, e.g. "en". None: found in the data.
    source_language: str | None = None
    target_language: str | None = None
    direction: Literal["forward", "backward", "both"] = "forward"  # both: two examples a record
    # E.g. "Translate to {target_name}: {source}". None: a chat turn if there is a chat template.
    template: str | None = None


class DataSection(Section):
    """What the model learns from, and what it is evaluated on."""

    train: Sources
    validation: Sources | None = None  # None: `validation_fraction` of `train` is held out
    test: Sources | None = None  # for `finetune evaluate`; None: the validation data
    # Plain text of another kind. Its loss before and after training shows what is forgotten.
    unrelated: Sources | None = None
    validation_fraction: Fraction = 0.05  # share of the records of `train`
    # True: training examples that are also held out, token for token, are left out of training.
    drop_duplicates: bool = False
    # Records of held-out and of unrelated text; None: all. Test data is always read whole.
    max_validation_records: PositiveInt | None = 500
    format: Literal["auto", "chat", "translation", "text"] = "auto"  # auto: by the columns
    # The format's name of a column -> the data's name of it, e.g. {prompt: question}.
    columns: dict[str, str] = {}
    system_prompt: str | None = None  # put before conversations that have none
    # Records that do not fit the format, and lines that are none. error: all are listed before
    # training. drop: they are left out, counted and reported.
    on_bad_record: Literal["error", "drop"] = "error"
    merge_turns: bool = False  # True: chat turns of one role in a row are joined by a blank line
    # Variables of the chat template, in training and in use, e.g. {enable_thinking: false}.
    chat_template_kwargs: dict[str, Any] = {}
    # The day that a chat template prints as today, in training and evaluation; chat and generate
    # print the real one. None: the day of the run's first start.
    template_date: date | None = None
    # A text with a special token such as <|im_end|>. parse: learnt as that token, which is what
    # servers read, and counted. refuse: a bad record.
    control_tokens: Literal["parse", "refuse"] = "parse"
    # What is learnt. assistant: the assistant's turns with their end mark. all: every token.
    targets: Literal["assistant", "all"] = "assistant"
    translation: TranslationSection = TranslationSection()
    max_length: TokenCount = 512  # tokens of an example and of a packed sequence
    overlong: Literal["truncate", "drop", "error"] = "truncate"  # examples over max_length
    # True: several examples a sequence, isolated from each other. False: one example a sequence,
    # padded, in batches of sequences of similar length.
    packing: bool = True
    streaming: bool = False  # True: read records during training; needs training.max_steps
    shuffle_buffer: PositiveInt = 2048  # examples, streaming only


class VocabularySection(Section):
    """Which rows of the token table train."""

    # auto: `active` if the table is tied and at least 10 % of it is unused, otherwise `full`.
    #   With LoRA: `full`, or `frozen` if `keep` is set.
    # full: every row.
    # active: the rows of tokens in the data, of special tokens and of bytes. The loss is the same.
    # sampled: as `active`, but the softmax covers the active rows and a sample of the others.
    #   This is the fast mode for large vocabularies.
    # frozen: only the rows of new tokens and of `keep`.
    # Held-out data counts as data here. data.test and data.unrelated do not. Of a stream, only the
    # first records are read for this. Tokens that turn up later get spare rows: as many as are
    # active at the start, and at least 1,024. Further tokens keep their frozen rows.
    mode: Literal["auto", "full", "active", "sampled", "frozen"] = "auto"
    # More tokens that train: ids, or texts whose tokens are meant (" a" is not "a").
    keep: tuple[StrictInt | str, ...] = ()
    num_sampled: TokenCount = 4096  # frozen rows drawn for each step (mode `sampled`)


class OptimizerSection(BaseModel):
    """The optimizer. A key that is not listed here is an option of the optimizer itself.

    An optimizer refuses the options that it does not take.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "lazy_adamw"  # `finetune optimizers` lists them
    lr: Rate = 5e-5
    # None: the optimizer's own, which is 0.01 for adamw and lazy_adamw.
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    no_decay: tuple[str, ...] = ("bias", "norm", "embedding")  # parameters without weight decay
    # Factor on lr from one layer to the one below it. None: the same lr for all.
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    overrides: tuple[dict[str, Any], ...] = ()  # e.g. [{pattern: "*.embed_tokens.*", lr: 1e-5}]

    @model_validator(mode="after")
    def _finite(self) -> "OptimizerSection":
        for key, value in self.options.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"optimizer.{key} = {value!r} is not allowed: give a number")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keys for the optimizer itself (betas, eps, momentum ...)."""
        return dict(self.model_extra or {})


class SchedulerSection(Section):
    """How the learning rate changes during training."""

    name: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_ratio: Fraction = 0.03  # share of all steps
    warmup_steps: NonNegativeInt | None = None  # steps; overrides the ratio
    min_lr_ratio: Fraction = 0.0  # the lowest rate of the decay, as a share of lr


class TrainingSection(Section):
    """The loop: how long, in what pieces, in which precision."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3.0
    max_steps: PositiveInt | None = None  # optimizer steps; overrides epochs
    batch_size: PositiveInt = 16  # sequences per optimizer step, over all processes
    micro_batch_size: PositiveInt = 4  # sequences per forward of one device; gradients accumulate
    # Beginnings that examples of a step have in common are computed once. The results are the same
    # up to rounding. auto: if that saves 5 % of the tokens, and the model allows it.
    share_prefixes: Literal["auto"] | bool = "auto"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matmuls; weights stay fp32
    activation_checkpointing: bool = False  # True: less memory, slower steps
    # torch.compile: on a GPU about ten seconds at the first step, then faster. Not for a CPU.
    compile: bool = False
    # Nats above the best running loss at which the run stops.
    divergence_threshold: Annotated[float, Field(gt=0)] = 4.0
    timeout: Seconds = 600  # seconds to wait for another process; then the run ends


class EvaluationSection(Section):
    """When and how held-out data is evaluated."""

    every: PositiveInt | None = None  # steps; None: at the end of each epoch, and at the end
    before: bool = True  # also before the first step
    batch_size: PositiveInt = 16  # sequences per forward
    # In addition to the loss. None: both for translation, none for other formats.
    metrics: tuple[Literal["chrf", "bleu", "tool_calls"], ...] | None = None
    generate: NonNegativeInt = 64  # held-out prompts to answer for these metrics; 0: none
    samples: NonNegativeInt = 8  # answers kept in samples.jsonl, with or without such metrics
    best: Literal["loss", "chrf"] = "loss"  # decides the best checkpoint and early stopping
    # Evaluations without an improvement, after which the run stops. None: it never does.
    early_stopping_patience: PositiveInt | None = None


class CheckpointSection(Section):
    """When checkpoints are written, and which are kept."""

    every: PositiveInt | None = None  # steps; None: at each evaluation
    keep: PositiveInt = 2  # the newest ones; the best one is also kept
    save_best_model: bool = True  # model/ gets the best evaluation's weights; False: the last ones


class GenerationSection(Section):
    """How text is generated."""

    max_new_tokens: TokenCount = 128  # tokens an answer
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # probability kept for sampling; 1: all
    top_k: NonNegativeInt = 0  # tokens kept for sampling; 0: all
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0  # above 1 discourages repetition
    batch_size: PositiveInt = 64  # prompts at a time


class RunConfig(Section):
    """The whole configuration of a run."""

    output_dir: Annotated[
        Path, AfterValidator(lambda path: Path(expand(str(path))))
    ]  # default: runs/<name of the config file>
    overwrite_output_dir: bool = False  # True: delete another run that is there
    seed: SeedNumber = 0  # of the weights, the order of the data, dropout and drawn rows
    model: ModelSection
    data: DataSection
    vocabulary: VocabularySection = VocabularySection()
    optimizer: OptimizerSection = OptimizerSection()
    scheduler: SchedulerSection = SchedulerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    generation: GenerationSection = GenerationSection()
    tracking: tuple[str, ...] = ()  # Accelerate's trackers: tensorboard, wandb, mlflow, ...
