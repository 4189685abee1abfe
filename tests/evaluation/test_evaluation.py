"""Loss and text metrics: token-exact, the same however the data is cut, the same as by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU

from finetune.data.batches.collate import collate
from finetune.data.formats.rendering import encode_text
from finetune.data.types import IGNORE_INDEX, Prompt, targets_of
from finetune.errors import UserError
from finetune.evaluation import evaluate_generation, evaluate_loss
from finetune.evaluation.answers import text_metrics
from finetune.evaluation.loss import bits_per_byte, count_target_bytes, perplexity
from finetune.inference.generation import GenerationSettings, generate
from finetune.models.adapters import add_lora
from finetune.models.language_model import LanguageModel
from finetune.models.vocabulary.activate import activate_vocabulary
from tests.inference.conftest import tiny_model

CPU = torch.device("cpu")
SENTENCES = [
    "Where is the café?",
    "Où est le café ?",
    "The file was not found, so look again.",
    "Ja.",
    "日本語 🙂 mixed",
    "one two three",
]
GREEDY = GenerationSettings.greedy(6, [1])


@pytest.fixture
def examples(tokenizer):
    return [encode_text(tokenizer, text, [(len(text) // 2, len(text))]) for text in SENTENCES]


def batches_of(examples, size, packed=False):
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    if packed:
        return [collate([group], pad_id=0, packed=True, pad_to_multiple_of=1) for group in groups]
    return [
        collate([[e] for e in group], pad_id=0, packed=False, pad_to_multiple_of=8)
        for group in groups
    ]


def by_hand(model, examples):
    """Mean over all target tokens, each example alone through the bare model."""
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        total += float(
            F.cross_entropy(
                logits, torch.tensor(example.labels[1:]), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += example.num_target_tokens
    return total / count


def test_the_mass_on_inactive_tokens_is_known_where_the_model_makes_its_logits_by_itself(
    tokenizer, examples
):
    model = tiny_model("llama")
    module = LanguageModel(
        add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["lm_head"])
    )
    assert not module.fused
    inactive = torch.arange(len(model.get_input_embeddings().weight)) % 2 == 0
    result = evaluate_loss(
        module, batches_of(examples, 3), inactive=inactive, num_bytes=1, device=CPU
    ).as_dict()
    assert 0.1 < result["inactive_mass"] < 0.9
    assert 0 < result["share_outside"] < 1


@pytest.mark.parametrize(("size", "packed"), [(1, False), (2, False), (6, False), (3, True)])
def test_loss_is_the_mean_over_tokens_whatever_the_batches(
    any_model, tokenizer, examples, size, packed
):
    result = evaluate_loss(
        LanguageModel(any_model),
        batches_of(examples, size, packed),
        num_bytes=1,
        device=CPU,
    )
    assert result.loss == pytest.approx(by_hand(any_model, examples), rel=1e-5)
    assert result.num_target_tokens == sum(example.num_target_tokens for example in examples)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_the_loss_apart_for_tokens_outside_adds_up(llama, tokenizer, examples, fused, compact):
    inactive = torch.zeros(len(llama.get_input_embeddings().weight), dtype=torch.bool)
    inactive[examples[0].input_ids[3:5]] = inactive[250:] = True
    nats, masses = [], []
    for example in examples:
        with torch.no_grad():
            logs = torch.log_softmax(
                llama(input_ids=torch.tensor([example.input_ids])).logits[0, :-1], 1
            )
        targets = [
            (i, label) for i, label in enumerate(example.labels[1:]) if label != IGNORE_INDEX
        ]
        nats += [(-float(logs[i, label]), bool(inactive[label])) for i, label in targets]
        masses += [float(logs[i].exp()[inactive].sum()) for i, _ in targets]
    model = copy.deepcopy(llama)
    if compact:
        activate_vocabulary(model, (~inactive).nonzero()[:, 0].tolist(), spare=2)
    module = LanguageModel(model)
    module.fused = fused
    result = evaluate_loss(
        module, batches_of(examples, 2), inactive=inactive, num_bytes=1, device=CPU
    )
    apart = result.vocabulary
    outside = [loss for loss, is_outside in nats if is_outside]
    assert 0 < len(outside) < len(nats)
    assert apart.loss_outside == pytest.approx(sum(outside) / len(outside), rel=1e-4)
    assert apart.share_outside == pytest.approx(len(outside) / len(nats))
    assert apart.inactive_mass == pytest.approx(sum(masses) / len(masses), rel=1e-4)
    assert (
        max(masses) <= apart.inactive_mass_p99 <= max(masses) + 1.01e-3
    )  # of less than 100 positions the largest
    assert len(masses) < 100
    both = apart.share_outside * apart.loss_outside + (1 - apart.share_outside) * apart.loss_inside
    assert result.loss == pytest.approx(both) == pytest.approx(by_hand(llama, examples), rel=1e-5)


def test_the_loss_by_groups_of_target_tokens_is_that_counted_by_hand(llama, tokenizer, examples):
    groups = torch.arange(len(llama.get_input_embeddings().weight)) % 4
    groups[groups == 2] = 3  # no token is in group 2
    nats, counts = [0.0] * 4, [0] * 4
    for example in examples:
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        logs = torch.log_softmax(logits.double(), 1)
        for i, label in enumerate(example.labels[1:]):
            if label != IGNORE_INDEX:
                nats[groups[label]] -= float(logs[i, label])
                counts[groups[label]] += 1
    module, batches = LanguageModel(llama), batches_of(examples, 3, packed=True)
    result = evaluate_loss(module, batches, groups=groups, num_bytes=1, device=CPU)
    assert [group.num_target_tokens for group in result.by_group] == counts
    assert counts[2] == 0 < min(counts[0], counts[1], counts[3])
    assert [group.nats for group in result.by_group] == pytest.approx(nats, rel=1e-5)
    assert sum(nats) / sum(counts) == pytest.approx(result.loss, rel=1e-5)
    assert "by_group" not in result.as_dict()
    plain = evaluate_loss(module, batches, num_bytes=1, device=CPU)
    assert (plain.loss, plain.by_group) == (result.loss, ())


def test_processes_that_add_their_sums_get_what_one_process_gets(llama, tokenizer, examples):
    module, batches = LanguageModel(llama), batches_of(examples, 1)
    options = {"device": CPU, "groups": torch.arange(320) % 3}
    one = evaluate_loss(module, batches, num_bytes=9, **options)
    shares = []

    def keep(sums):
        shares.append(sums)
        return sums

    for share, num_bytes in ((batches[:4], 7), (batches[4:], 2)):
        evaluate_loss(module, share, num_bytes=num_bytes, reduce=keep, **options)
    empty = collate(
        [], pad_id=0, packed=False, pad_to_multiple_of=1
    )  # the filling of a process that has run out
    both = evaluate_loss(
        module,
        [empty],
        num_bytes=0,
        reduce=lambda own: own + shares[0] + shares[1],
        **options,
    )
    assert both == one
    assert all(group.num_target_tokens for group in one.by_group)
    assert shares[0].dtype == torch.float64


def test_of_two_hundred_positions_the_third_largest_mass_is_the_99th_percentile(tokenizer):
    masses = [*torch.linspace(0.2, 0.4, 198).tolist(), 0.8, 0.9]

    class Known(torch.nn.Module):
        def forward(self, input_ids, targets, reduction, inactive):
            return torch.stack([torch.ones(200), torch.tensor(masses)], 1)

    labels = torch.full((1, 201), 3)
    inactive = torch.zeros(10, dtype=torch.bool)
    batch = {"input_ids": labels, "targets": targets_of(labels)}
    result = evaluate_loss(Known(), [batch], inactive=inactive, num_bytes=1, device=CPU)
    assert 0.4 <= result.vocabulary.inactive_mass_p99 <= 0.401
    masses[:] = [math.nan] * 200  # of a model that has diverged
    result = evaluate_loss(Known(), [batch], inactive=inactive, num_bytes=1, device=CPU)
    assert result.vocabulary.inactive_mass_p99 == 1


def test_the_share_of_generated_tokens_outside(llama, tokenizer, examples):
    prompts = [Prompt(input_ids=tuple(e.input_ids[:4]), text="", reference="a") for e in examples]
    answers = generate(llama, [p.input_ids for p in prompts], batch_size=4, settings=GREEDY)
    tokens = [token for answer in answers for token in answer]
    inactive = torch.zeros(len(llama.get_input_embeddings().weight), dtype=torch.bool)
    inactive[tokens[0]] = True
    scores, _ = evaluate_generation(
        llama, tokenizer, prompts, metrics=(), batch_size=4, inactive=inactive, settings=GREEDY
    )
    assert scores == {"generated_outside": tokens.count(tokens[0]) / len(tokens)}
    assert 0 < scores["generated_outside"] <= 1
    assert (
        evaluate_generation(llama, tokenizer, prompts, metrics=(), batch_size=4, settings=GREEDY)[0]
        == {}
    )


def test_bytes_are_those_of_the_target_text_without_marks(tokenizer):
    ids = tokenizer("abc é🙂<|im_end|>def", add_special_tokens=False)["input_ids"]
    skipped = len(tokenizer.decode(ids[:1]).encode())
    found = count_target_bytes([IGNORE_INDEX, *ids[1:]], tokenizer)
    assert found == len("abc é🙂def".encode()) - skipped
    assert count_target_bytes([IGNORE_INDEX] * 4, tokenizer) == 0


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight(tokenizer):
    labels = torch.tensor(
        [[IGNORE_INDEX, *tokenizer("qqqq", add_special_tokens=False)["input_ids"]]]
    )
    assert int((labels != IGNORE_INDEX).sum()) == 4  # one token a byte

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, targets, reduction):
            assert reduction == "none"
            losses = torch.tensor(256.0).log().expand(len(targets))
            return torch.stack([losses, torch.zeros_like(losses)], 1)

    result = evaluate_loss(
        Uniform(),
        [{"input_ids": labels.clamp(min=0), "targets": targets_of(labels)}],
        num_bytes=count_target_bytes(labels[0].tolist(), tokenizer),
        device=CPU,
    )
    assert (result.bits_per_byte, result.num_target_bytes) == (pytest.approx(8.0), 4)


def test_no_target_is_an_error_and_the_mode_comes_back(llama, tokenizer):
    module = LanguageModel(llama)
    nothing = {
        "input_ids": torch.zeros(1, 3, dtype=torch.long),
        "targets": torch.empty(0, 2, dtype=torch.long),
    }
    module.train()
    with pytest.raises(UserError, match="no target token"):
        evaluate_loss(module, [nothing], num_bytes=0, device=CPU)
    assert module.training
    module.eval()


def test_perplexity_overflows_to_infinity_and_bytes_may_be_none():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert math.isnan(bits_per_byte(3.0, 0))
    assert bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2.0)


def test_perfect_and_empty_outputs_score_the_extremes():
    references = ["the cat sat on the mat today", "le chat est assis sur le tapis"]
    perfect = text_metrics(["chrf", "bleu"], references, references)
    assert (perfect["chrf"], perfect["bleu"]) == (pytest.approx(100), pytest.approx(100))
    empty = text_metrics(["chrf", "bleu"], ["", ""], references)
    assert (empty["chrf"], empty["bleu"]) == (0.0, 0.0)


def test_chrf_and_bleu_by_hand():
    # chrF of "abd" against "abc": unigrams 2/3, bigrams 1/2, trigrams 0; there are no longer ones.
    assert text_metrics(["chrf"], ["abd"], ["abc"])["chrf"] == pytest.approx(
        100 * (2 / 3 + 1 / 2 + 0) / 3
    )
    # BLEU: 5 words against 6. Precisions 5/5, 4/4, 3/3, 2/2; brevity penalty exp(1 - 6/5).
    score = text_metrics(["bleu"], ["a b c d e"], ["a b c d e f"])
    assert score["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))
    assert "tok:13a" in score["bleu_signature"]
    assert "version:" in score["bleu_signature"]


def test_an_unknown_metric_and_an_empty_corpus_are_explained():
    with pytest.raises(UserError, match="Did you mean 'chrf'"):
        text_metrics(["chrf2"], ["a"], ["a"])
    with pytest.raises(UserError, match="there is no output"):
        text_metrics(["bleu"], [], [])
    assert text_metrics([], [], []) == {}


SENTENCES = {
    "zh": "我喜欢在北京的公园里散步和看书。",
    "zho_Hant": "我喜歡在北京的公園裡散步和看書。",
    "yue": "我鍾意喺公園度行下同埋睇下書。",
    "Japanese": "私は公園で散歩をするのが好きです。",
    "ko": "나는 공원에서 산책하는 것을 좋아한다.",
    "th": "ฉันชอบเดินเล่นในสวนสาธารณะ",
    "km": "ខ្ញុំចូលចិត្តដើរលេងនៅក្នុងសួន",
    "my": "ကျွန်တော်ပန်းခြံထဲမှာလမ်းလျှောက်ရတာကြိုက်တယ်",
    "fr": "J'aime marcher dans le parc.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_bleu_cuts_into_words_by_the_rules_of_the_target_language(language):
    text = SENTENCES[language]
    scores = text_metrics(["bleu"], [text], [text], languages=[language])
    assert scores["bleu"] == pytest.approx(100)
    allowed = {
        "fr": ["13a"],
        "Japanese": ["ja-mecab-0", "ja-mecab", "char"],
        "ko": ["ko-mecab", "char"],
        **{key: ["char"] for key in ("th", "km", "my")},
    }.get(language, ["zh"])
    signature = dict(part.split(":", 1) for part in scores["bleu_signature"].split("|"))
    assert any(signature["tok"].startswith(name) for name in allowed), signature
    assert len(SENTENCES) == 9


def test_bleu_of_two_languages_cuts_each_by_its_own_rules():
    texts = [SENTENCES["zh"], SENTENCES["fr"]]
    other = ["我在公园里看书。", "J'aime le parc."]
    both = text_metrics(["bleu"], other, texts, languages=["zh", "fr"])
    cut = [BLEU(tokenize=name).tokenizer for name in ("zh", "13a")]
    expected = BLEU(tokenize="none", force=True).corpus_score(
        [c(t) for c, t in zip(cut, other)], [[c(t) for c, t in zip(cut, texts)]]
    )
    assert both["bleu"] == expected.score
    assert "tok:13a+zh" in both["bleu_signature"]


def test_generation_is_scored_over_all_processes_in_order(llama, tokenizer):
    texts = ["Where is the café?", "The file", "Ja.", "one two"]
    prompts = [Prompt(tokenizer(text)["input_ids"], text, text.upper()) for text in texts]
    scores, samples = evaluate_generation(
        llama, tokenizer, prompts, metrics=["chrf"], batch_size=3, settings=GREEDY
    )
    assert [sample["prompt"] for sample in samples] == texts
    assert [sample["reference"] for sample in samples] == [text.upper() for text in texts]
    answers = generate(
        llama, [prompt.input_ids for prompt in prompts], batch_size=1, settings=GREEDY
    )
    assert [sample["output"] for sample in samples] == [
        tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers
    ]
    assert scores == text_metrics(
        ["chrf"], [s["output"] for s in samples], [s["reference"] for s in samples]
    )

    first = evaluate_generation(
        llama, tokenizer, prompts[:2], metrics=(), batch_size=3, settings=GREEDY
    )[1]
    joined = evaluate_generation(
        llama,
        tokenizer,
        prompts[2:],
        metrics=["chrf"],
        batch_size=3,
        gather=lambda own: first + own,
        settings=GREEDY,
    )
    assert joined == (scores, samples)
