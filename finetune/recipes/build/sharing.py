"""Whether a run computes beginnings that its examples have in common once, and what it saves."""

from dataclasses import dataclass, replace

from finetune.config import RunConfig
from finetune.data.batches.dataset import TrainingBatches
from finetune.data.batches.steps import BatchShape
from finetune.data.batches.trees import LEAST, LEAST_SAVED, common_tokens
from finetune.data.encode import EncodedDataset, spread
from finetune.data.near_misses import near_miss
from finetune.errors import UserError
from finetune.models.describe import CausalLM
from finetune.models.language_model import LanguageModel
from finetune.models.probes import tree_obstacle, why_no_trees
from finetune.recipes.build.material import Material
from finetune.recipes.build.size import batch_size_of, packed_length_of

EXAMPLES_COUNTED = 20_000  # at most, spread over the data: planning more takes seconds
STEPS_COUNTED = 100  # of an epoch of these, spread over it
LARGER = 4  # the factor on the batch size for what a smaller batch loses


@dataclass(frozen=True)
class Sharing:
    """What the examples of a run's steps share. Counts are those of the steps looked at."""

    tokens: int  # of the examples
    computed: int  # of these, if each shared beginning is computed once a micro-batch
    common: int  # tokens that all examples have at their start, before the first target
    larger: float  # times fewer tokens, if micro-batches and batches were larger by LARGER
    all_learnt: bool  # every token is a target, so that nothing can be shared
    obstacle: str | None  # why the model or the config cannot, the end of a sentence about it
    wanted: bool | None  # of the config; None: if it saves enough

    @property
    def saved(self) -> float:
        """The share of tokens that need not be computed, from 0 to 1."""
        return 1 - self.computed / self.tokens

    @property
    def shares(self) -> bool:
        """Whether the run shares."""
        if self.obstacle is not None or self.wanted is False:
            return False
        return self.wanted is True or self.saved >= LEAST_SAVED

    @property
    def possible(self) -> bool:
        """Whether evaluations share if it saves enough."""
        return self.obstacle is None and self.wanted is not False

    def line(self) -> str:
        """Return what is shared, or why nothing is."""
        if self.shares and self.computed < self.tokens:
            which = (
                f"the first {self.common:,} tokens of all examples are"
                if self.common >= LEAST
                else "what examples have in common at their start is"
            )
            return (
                f"{which} computed once a micro-batch: {self.tokens / self.computed:.1f} times "
                f"fewer tokens{self._loses('times')}"
            )
        if self.wanted is False:
            return "none, as asked for (training.share_prefixes)"
        if self.all_learnt:
            return "none, since every token is learnt (plain text, or data.targets: all)"
        if self.obstacle is not None and self.saved >= LEAST_SAVED:
            return f"none, though they are {self.saved:.0%} of the tokens: {self.obstacle}"
        return f"none worth it: {self.saved:.1%} of the tokens{self._loses('times fewer tokens')}"

    def _loses(self, times: str) -> str:
        if self.obstacle is not None or self.larger < 1.15 * self.tokens / self.computed:
            return ""
        return (
            f" ({self.larger:.1f} {times} if training.batch_size and micro_batch_size were "
            f"{LARGER} times as large)"
        )


def plan_sharing(
    config: RunConfig,
    train: EncodedDataset,
    shape: BatchShape,
    *,
    model: CausalLM,
    language_model: LanguageModel | None = None,
) -> Sharing:
    """Return what the steps of a run share, the same on all processes.

    Of a stream, `train` has the first records. `language_model` is tried on a few tokens. Raises
    UserError if the config wants what is impossible.
    """
    choice = config.training.share_prefixes
    wanted = None if choice == "auto" else choice
    obstacle = sharing_obstacle(config, model, language_model)
    if wanted is True and obstacle is not None:
        raise UserError(
            f"training.share_prefixes is true, which is not possible: {obstacle}. "
            "Set training.share_prefixes: auto"
        )
    max_length, train = packed_length_of(config), spread(train, EXAMPLES_COUNTED)
    packed = replace(shape, packing=True, share=True)
    batches = TrainingBatches(train, packed, max_length=max_length)
    tokens, computed = batches.count_shared(STEPS_COUNTED)
    many = replace(
        packed,
        batch_size=LARGER * shape.batch_size,
        micro_batch_size=LARGER * shape.micro_batch_size,
    )
    wide = TrainingBatches(train, many, max_length=max_length)
    all_tokens, fewer = wide.count_shared(-(-STEPS_COUNTED // LARGER))
    return Sharing(
        tokens=tokens,
        computed=computed,
        common=common_tokens(train, STEPS_COUNTED),
        larger=all_tokens / fewer,
        all_learnt=sum(train.target_counts) >= len(train.token_ids) - len(train),
        obstacle=obstacle,
        wanted=wanted,
    )


def step_shape(config: RunConfig) -> BatchShape:
    """Return the shape of the steps of a run in one process, where padding does not matter."""
    return BatchShape(
        packing=config.data.packing,
        batch_size=batch_size_of(config),
        micro_batch_size=config.training.micro_batch_size,
        pad_id=0,
        seed=config.seed,
    )


def sharing_lines(material: Material) -> list[str]:
    """Return what a run on `material` shares, and what keeps it from sharing more.

    Raises UserError as `plan_sharing` does.
    """
    config, shape = material.config, step_shape(material.config)
    sharing = plan_sharing(config, material.train, shape, model=material.skeleton)
    lines = [f"shared beginnings: {sharing.line()}"]
    if sharing.possible:
        packed, length = replace(shape, share=True), packed_length_of(config)
        miss = near_miss(material.train, packed, material.tokenizer, max_length=length)
        lines += [] if miss is None else [f"shared beginnings: {miss.sentence()}"]
    return lines


def sharing_obstacle(
    config: RunConfig, model: CausalLM, language_model: LanguageModel | None = None
) -> str | None:
    """Return why examples cannot share beginnings; None if they can.

    `language_model` is tried on a few tokens.
    """
    if not config.data.packing:
        return "examples are padded instead of packed (data.packing)"
    if config.model.lora is not None and config.model.lora.dropout:
        return "model.lora.dropout would be drawn once for all examples that share a beginning"
    if config.training.compile:
        return "training.compile is true"
    found = tree_obstacle(model, max_length=config.data.max_length)
    if found is None and language_model is not None:
        return why_no_trees(language_model)
    return found
