"""The configuration: one YAML file, one frozen tree, every default in this one place with its unit.

Floor 4, so that no room below can know it. `finetune.recipes` is the only reader.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    model_validator,
)

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen section in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LoraSection(Section):
    """Low-rank adapters through peft (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 16
    alpha: float = 32.0
    dropout: Fraction = 0.0  # on a CPU drawing the masks is up to a third of the time of a step
    target_modules: str | tuple[str, ...] = "all-linear"


class NewTokenizerSection(Section):
    """A byte-level BPE tokenizer trained on the run's own training data, for models made from `model.config`."""

    vocab_size: PositiveInt = 1024


class ModelSection(Section):
    """Which model: `name` (pretrained) or `config` (random weights)."""

    name: str | None = (
        None  # hub name, folder, .gguf file, or package:NAME for a pip package that ships a .gguf
    )
    config: dict[str, Any] | None = (
        None  # e.g. {model_type: llama, hidden_size: 64, ...}: a random model, no download
    )
    tokenizer: NewTokenizerSection | None = (
        None  # with `config` only; default: NewTokenizerSection()
    )
    revision: str | None = None  # hub branch, tag or commit
    trust_remote_code: bool = False
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    chat_template: str | None = (
        None  # None: the tokenizer's own; "chatml"; or a path to a Jinja file
    )
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if (self.name is None) == (self.config is None):
            raise ValueError(
                "give either model.name (a pretrained model) or model.config (a random one), not both and not neither"
            )
        return self


class SourceSection(Section):
    """One source of rows. Written as a plain string, it is the `path`."""

    path: str  # hub name, or a local .json/.jsonl/.csv/.tsv/.parquet/.txt file, folder or glob; package:NAME for the demo data
    name: str | None = None  # the hub dataset's configuration, e.g. "en-fr"
    split: str = "train"
    revision: str | None = None
    target_path: str | None = None  # the second of two aligned text files (translation)
    weight: Annotated[float, Field(gt=0)] | None = (
        None  # share of this source in a mix; None for all: every record once
    )
    max_records: PositiveInt | None = None  # read at most this many, from the start


def _as_sources(value: Any, info: ValidationInfo) -> Any:
    """Let `train: file.jsonl` and `train: {path: ...}` stand for a list of one."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError(
            f"data.{info.field_name} is an empty list: name a file or a dataset, or leave the key out"
        )
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_as_sources)]


class TranslationSection(Section):
    """How a pair of sentences becomes a prompt and an answer."""

    source_language: str | None = (
        None  # the key in `translation`, or the column, e.g. "en"; None: found in the data
    )
    target_language: str | None = None
    direction: Literal["forward", "backward", "both"] = "forward"
    template: str | None = (
        None  # e.g. "Translate to {target_name}: {source}"; None: a chat turn where there is a chat template
    )


class DataSection(Section):
    train: Sources
    validation: Sources | None = None  # None: `validation_fraction` of `train` is held out
    test: Sources | None = None  # for `finetune evaluate`; None: the validation data
    unrelated: Sources | None = (
        None  # plain text of another kind: its loss, before and after, tells what is forgotten
    )
    validation_fraction: Fraction = 0.05
    max_validation_records: PositiveInt | None = (
        500  # of held-out and of unrelated text; test data is read whole
    )
    format: Literal["auto", "chat", "translation", "text"] = "auto"
    columns: dict[
        str, str
    ] = {}  # what the format calls a column -> what the data calls it, e.g. {prompt: question}
    system_prompt: str | None = None  # put before conversations that have none
    targets: Literal["assistant", "all"] = (
        "assistant"  # what is learnt: the assistant's turns with their end mark, or every token
    )
    translation: TranslationSection = TranslationSection()
    max_length: PositiveInt = 512  # tokens
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    # True: several examples a sequence, isolated from each other. False: one example a sequence, padded,
    # and sequences of similar length together.
    packing: bool = True
    streaming: bool = False  # read records during training; needs training.max_steps
    shuffle_buffer: PositiveInt = 2048  # examples, streaming only


class VocabularySection(Section):
    """Which rows of the token table train."""

    # auto: active for a tied table of which a tenth or more is not used, else full (with LoRA: full, or frozen where keep names
    # tokens). active: only the rows of tokens in the data, special tokens and bytes; the same loss. sampled: as active, and the
    # softmax is over them and a sample of the others: the fast mode for large vocabularies. frozen: no row, but for those of new
    # tokens and of keep. Tokens of held-out data are in the data, those of data.test and data.unrelated are not. Of a stream the
    # first rows are looked at; tokens that turn up later get rows that were set aside, as many as are active at the start and at
    # least 1,024, and past those keep their frozen ones.
    mode: Literal["auto", "full", "active", "sampled", "frozen"] = "auto"
    keep: tuple[
        StrictInt | str, ...
    ] = ()  # tokens that train besides: ids, or texts whose tokens are meant (" a" is not "a")
    num_sampled: PositiveInt = 4096  # frozen rows drawn for each step (sampled)


class OptimizerSection(BaseModel):
    """Keys that are not listed go to the optimizer itself, which refuses what it does not take."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "lazy_adamw"
    lr: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] | None = (
        None  # None: the optimizer's own (0.01 for adamw and lazy_adamw)
    )
    no_decay: tuple[str, ...] = (
        "bias",
        "norm",
        "embedding",
    )  # kinds of parameter without weight decay
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = (
        None  # lr factor from one layer to the one below it
    )
    overrides: tuple[dict[str, Any], ...] = ()  # e.g. [{pattern: "*.embed_tokens.*", lr: 1e-5}]

    @property
    def options(self) -> dict[str, Any]:
        """The keys for the optimizer itself (betas, eps, momentum ...)."""
        return dict(self.model_extra or {})


class SchedulerSection(Section):
    name: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_ratio: Fraction = 0.03  # of all steps
    warmup_steps: NonNegativeInt | None = None  # steps; overrides the ratio
    min_lr_ratio: Fraction = 0.0  # the floor of the decay, as a share of lr


class TrainingSection(Section):
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: PositiveInt | None = None  # optimizer steps; overrides epochs
    batch_size: PositiveInt = 16  # sequences per optimizer step, over all processes
    micro_batch_size: PositiveInt = (
        4  # sequences per forward on one device; gradient accumulation follows from it
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of the matmuls; the weights stay fp32
    )
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile: on a GPU about ten seconds at the first step, then faster; does not pay on a CPU
    divergence_threshold: Annotated[float, Field(gt=0)] = (
        4.0  # nats above the best running loss: the run stops
    )
    timeout: PositiveInt = 600  # seconds that a process waits for another one; then the run ends, as it does where a host is lost


class EvaluationSection(Section):
    every: PositiveInt | None = None  # steps; None: at the end of each epoch, and at the end
    before: bool = True  # also before the first step
    batch_size: PositiveInt = 16  # sequences per forward
    metrics: tuple[Literal["chrf", "bleu"], ...] | None = (
        None  # beside the loss; None: both for translation, none else
    )
    generate: NonNegativeInt = (
        64  # held-out prompts to generate for the metrics; 0: no such metrics
    )
    samples: NonNegativeInt = 8  # of them written to samples.jsonl (also where there is no metric)
    best: Literal["loss", "chrf"] = "loss"  # what the best checkpoint and early stopping go by
    early_stopping_patience: PositiveInt | None = None  # evaluations without improvement


class CheckpointSection(Section):
    every: PositiveInt | None = None  # steps; None: at each evaluation
    keep: PositiveInt = 2  # the newest so many; the best is kept besides
    save_best_model: bool = True  # model/ holds the best evaluation's weights, else the last step's


class GenerationSection(Section):
    max_new_tokens: PositiveInt = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0  # 0: off
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    batch_size: PositiveInt = 64  # prompts at a time


class RunConfig(Section):
    """The whole configuration of a run."""

    output_dir: Path  # default: runs/<name of the config file>
    overwrite_output_dir: bool = False  # delete another run that lies there
    seed: NonNegativeInt = 0
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
