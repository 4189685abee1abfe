"""The configuration: one YAML file, one frozen tree, and every default with its unit.

No room below this one knows the config. `finetune.recipes` is its only reader.
"""

import math
import typing
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from finetune.config.values import (
    MOST,
    Duration,
    Fraction,
    NonNegativeInt,
    Override,
    PathText,
    PositiveInt,
    Rate,
    Seconds,
    SeedNumber,
    TokenCount,
    expand,
)
from finetune.optim import is_adamw

_LORA_RATE = 5e-4


def _takes_numbers(kind: Any) -> bool:
    """Return whether a type of a key is that of numbers, or one of several that is."""
    parts = typing.get_args(kind)
    return kind in (int, float) or any(map(_takes_numbers, parts if parts else ()))


class Plain(BaseModel):
    """A section in which true and false are no numbers; pydantic takes them for 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and _takes_numbers(kind):
            raise ValueError("input should be a number")
        return value


class Section(Plain):
    """A frozen section in which an unknown key, and a number that is not finite, is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class LoraSection(Section):
    """Low-rank adapters through peft (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 16  # columns of the two factors; more learn more and take more memory
    alpha: PositiveFloat = 32.0  # the product of the factors is multiplied by alpha / rank
    dropout: Fraction = 0.0  # on a CPU, drawing the masks takes up to a third of a step's time
    # Names of the layers that get adapters. all-linear: all but the output head.
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
    # How attention is computed. sdpa: as torch does it best; eager: operator by operator.
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
    # .json, .jsonl, .ndjson, .csv, .tsv, .parquet or .txt, all but Parquet also compressed (.gz,
    # .zst, .bz2, .xz).
    path: PathText
    name: str | None = None  # the hub dataset's configuration, e.g. "en-fr"
    split: str = "train"  # of a hub dataset or a folder
    revision: str | None = None  # hub branch, tag or commit
    target_path: PathText | None = None  # the second of two aligned text files (translation)
    # This source's share of a mix. None for all sources: every record once.
    weight: Annotated[float, Field(gt=0, le=MOST)] | None = None
    max_records: PositiveInt | None = None  # read at most this many, from the start


def _as_sources(value: Any, info: ValidationInfo) -> Any:
    """Return the sources as mappings: one path or one mapping is a list of one."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items or value is None:
        leave_out = "" if info.field_name == "train" else ", or leave the key out"
        raise ValueError(f"data.{info.field_name} is empty. Name a file or a dataset{leave_out}")
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_as_sources)]


class TranslationSection(Section):
    """How a pair of sentences becomes a prompt and an answer."""

    # The key in `translation`, or the column, e.g. "en". None: found in the data.
    source_language: str | None = None
    target_language: str | None = None  # The same for the translation, e.g. "fr".
    direction: Literal["forward", "backward", "both"] = "forward"  # both: two examples a record
    # E.g. "Translate to {target_name}: {source}". None: a chat turn if there is a chat template.
    template: str | None = None

    @property
    def languages(self) -> tuple[str | None, str | None]:
        return self.source_language, self.target_language


class DataSection(Section):
    """What the model learns from, and what it is evaluated on."""

    train: Sources  # a file, folder, glob or hub name, or a list of them
    validation: Sources | None = None  # None: `validation_fraction` of `train` is held out
    test: Sources | None = None  # for `finetune evaluate`; None: the validation data
    # Plain text of another kind. Its loss before and after training shows what is forgotten.
    unrelated: Sources | None = None
    # Share of the records of `train`, up to `max_validation_records` of them. auto: 5 %, but of
    # little data 10 records, a fifth at most.
    validation_fraction: Fraction | Literal["auto"] = "auto"
    # True: training examples that are also held out, token for token, are left out of training.
    drop_duplicates: bool = False
    # Records of held-out and of unrelated text; None: all. Test data is always read whole.
    max_validation_records: PositiveInt | None = 500
    # auto (by the columns), chat, translation, text, or the name of a registered format.
    format: str = "auto"
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
    # Examples over max_length. truncate: their start is learnt. drop: they are left out, and
    # counted. error: the run does not start. split: a plain text becomes several examples, and
    # nothing of it is left out. None: split for plain text, truncate for other formats.
    overlong: Literal["truncate", "drop", "error", "split"] | None = None
    # False: the data is read and encoded at each start. True: once, and kept in
    # ~/.cache/finetune/encoded, or in $FINETUNE_CACHE/encoded: 10 GB at most, the oldest first out.
    cache: bool = True
    # True: several examples a sequence, isolated from each other. False: one example a sequence,
    # padded, in batches of sequences of similar length.
    packing: bool = True
    # Tokens of a packed sequence; a longer example has one of its own. None: max_length, or less if
    # training.batch_size is auto and the data small. Not for a stream.
    packed_length: TokenCount | None = None
    # True: read records during training. It needs training.max_steps or training.max_time.
    streaming: bool = False
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


def _is_finite(value: Any) -> bool:
    """Return whether all numbers in a value of YAML are finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


class OptimizerSection(Plain):
    """The optimizer. A key that is not listed here is an option of the optimizer itself.

    An optimizer refuses the options that it does not take.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "lazy_adamw"  # `finetune optimizers` lists them
    # The highest learning rate, which the schedule multiplies. For LoRA with AdamW it is 5e-4.
    lr: Rate = 5e-5
    # adamw and adam compute only the rows in use of an untied token table, with the same result.
    # auto: if the table, betas and options allow it; true: or the run stops; false: never.
    lazy: Literal["auto"] | StrictBool = "auto"
    # None: the optimizer's own, which is 0.01 for adamw and lazy_adamw.
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    no_decay: tuple[str, ...] = ("bias", "norm", "embedding")  # parameters without weight decay
    # Factor on lr from one layer to the one below it. None: the same lr for all.
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    overrides: tuple[Override, ...] = ()  # e.g. [{pattern: "*.embed_tokens.*", lr: 1e-5}]

    @model_validator(mode="after")
    def _finite(self) -> "OptimizerSection":
        for key, value in {**self.options, "overrides": self.overrides}.items():
            if not _is_finite(value):
                raise ValueError(f"optimizer.{key} = {value!r} is not allowed: give finite numbers")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keys for the optimizer itself (betas, eps, momentum ...)."""
        return dict(self.model_extra or {})


class SchedulerSection(Section):
    """How the learning rate changes during training."""

    # How the rate falls after the warm-up; constant: not at all.
    name: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_ratio: Fraction = 0.03  # share of all steps
    warmup_steps: NonNegativeInt | None = None  # steps; overrides the ratio
    min_lr_ratio: Fraction = 0.0  # the lowest rate of the decay, as a share of lr


class TrainingSection(Section):
    """The loop: how long, in what pieces, in which precision."""

    # Passes through the training data.
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3.0
    max_steps: PositiveInt | None = None  # optimizer steps; overrides epochs
    # Time instead of epochs: 15min, 2h, or seconds. It counts from the first step on, with the
    # evaluations between the steps. The run ends at the earlier of it and max_steps, and the
    # schedule follows the clock.
    max_time: Duration | None = None
    # Sequences per optimizer step, over all processes. auto: 16, or the next smaller power of two
    # with which the run has 100 steps; if 1 is too many, packed sequences are made shorter. With
    # max_steps or max_time, and for a stream: 8. A resumed run keeps what it began with.
    batch_size: PositiveInt | Literal["auto"] = "auto"
    micro_batch_size: PositiveInt = 4  # sequences per forward of one device; gradients accumulate
    # Beginnings that examples of a step have in common are computed once. The results are the same
    # up to rounding. auto: if that saves 5 % of the tokens, and the model allows it. true: however
    # little it saves; a model or a setting that does not allow it is then an error.
    share_prefixes: Literal["auto"] | bool = "auto"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    # auto: the CUDA GPU if there is one, else the CPU. mps: the GPU of a Mac, which is not tried
    # here; the run begins only if a small batch gives the CPU's loss and gradients there.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matmuls; weights stay fp32
    activation_checkpointing: bool = False  # True: less memory, slower steps
    # torch.compile: on a GPU about ten seconds at the first step, then faster. Not for a CPU.
    compile: bool = False
    # Nats above its best at which the average loss of the last ten steps, or of more if they are
    # small, stops the run.
    divergence_threshold: Annotated[float, Field(gt=0)] = 4.0
    timeout: Seconds = 600  # seconds to wait for another process; then the run ends


class EvaluationSection(Section):
    """When and how held-out data is evaluated."""

    # Steps from one evaluation to the next. None: one at the end of each epoch, and at the end; of
    # a stream one after each tenth of its steps, or of its time.
    every: PositiveInt | None = None
    before: bool = True  # also before the first step
    batch_size: PositiveInt = 16  # sequences per forward
    # In addition to the loss. None: chrf and bleu for translation, tool_calls for conversations
    # that call tools, none for other data.
    metrics: tuple[Literal["chrf", "bleu", "tool_calls"], ...] | None = None
    generate: NonNegativeInt = 64  # held-out prompts to answer for these metrics; 0: none
    samples: NonNegativeInt = 8  # answers kept in samples.jsonl, with or without such metrics
    best: Literal["loss", "chrf"] = "loss"  # decides the best checkpoint and early stopping
    # Evaluations without an improvement, after which the run stops. None: it never does.
    early_stopping_patience: PositiveInt | None = None


class CheckpointSection(Section):
    """When checkpoints are written, and which are kept."""

    # Steps. None: at each evaluation, and after 30 minutes without a checkpoint.
    every: PositiveInt | None = None
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


def _named(path: Any) -> Any:
    """Return the path of a folder. Raises ValueError for "", which would be the current folder."""
    if isinstance(path, str) and not path.strip():
        raise ValueError(f"output_dir is {path!r}, which names no folder. Name one, such as runs/a")
    return path


def _expanded(path: Path) -> Path:
    return Path(expand(str(path)))


class RunConfig(Section):
    """The whole configuration of a run."""

    # The run's folder. Default: runs/<name of the config file>.
    output_dir: Annotated[Path, BeforeValidator(_named), AfterValidator(_expanded)]
    overwrite_output_dir: bool = False  # True: first delete the run that is in output_dir
    # Seed of random weights, the order of the data, dropout and the drawn rows.
    seed: SeedNumber = 0
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

    @model_validator(mode="after")
    def _rate_of_lora(self) -> "RunConfig":
        """Give LoRA with AdamW its own default of the learning rate (docs/guide.md, "By mode")."""
        given = "lr" in self.optimizer.model_fields_set or not is_adamw(self.optimizer.name)
        if self.model.lora is not None and not given:
            optimizer = self.optimizer.model_copy()  # configs may share the default section
            object.__setattr__(optimizer, "lr", _LORA_RATE)
            object.__setattr__(self, "optimizer", optimizer)
        return self
