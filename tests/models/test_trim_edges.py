"""Trims of odd tokenizers and configs: no text is lost, nothing a model needs goes."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.models.trim.keep import needed_tokens, tokens_of_texts
from finetune.models.trim.model import trim_model
from finetune.models.trim.renumber import stated_ids
from finetune.models.trim.tokenizer import trim_tokenizer

CORPUS = ["a quick brown fox, a lazy dog", "le fichier enregistré été", "日本 the other words"]
TEXTS = [*CORPUS, "é日x dog", "quick quick ABC", "unseen ✓ words", ""]


def characters(**model: str) -> Tokenizer:
    """Return a BPE over characters, which has no bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def with_unknown() -> Tokenizer:
    """Return one whose token for unknown characters is not a special one."""
    tokenizer = characters()
    tokenizer.add_tokens([AddedToken("[UNK]", normalized=False)])
    tree = tokenizer.to_str().replace('"unk_token":null', '"unk_token":"[UNK]"')
    places = tokenizer.get_vocab()["[UNK]"]
    start, end = tree.index('"added_tokens":['), tree.index('"normalizer"')
    added = tree[start:end]
    tree = tree.replace(added, added[: added.rindex(",{")] + "],")
    return Tokenizer.from_str(tree.replace('"vocab":{', f'"vocab":{{"[UNK]":{places},'))


def some_bytes() -> Tokenizer:
    """Return one with byte fallback that lacks most bytes."""
    tree = characters().to_str().replace('"byte_fallback":false', '"byte_fallback":true')
    return Tokenizer.from_str(tree)


def begins_with_a_word() -> Tokenizer:
    """Return one that puts an ordinary token before each text."""
    tokenizer = characters()
    number = tokenizer.get_vocab()["x"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="x $A", special_tokens=[("x", number)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [characters, with_unknown, some_bytes, begins_with_a_word])
def test_no_text_is_lost(make) -> None:
    whole = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    kept = needed_tokens(whole) | tokens_of_texts(whole, ["a lazy dog"])
    trimmed = trim_tokenizer(whole, kept)
    assert len(trimmed.kept) < len(whole)
    for text in TEXTS:
        old, new = whole(text).input_ids, trimmed.tokenizer(text).input_ids
        assert trimmed.tokenizer.decode(new) == whole.decode(old), text
        if set(old) <= trimmed.new_ids.keys():
            assert [trimmed.kept[token] for token in new] == old


def test_a_token_of_the_post_processor_without_a_row_is_refused() -> None:
    tokenizer = characters()
    tokenizer.add_special_tokens(["<bos>"])
    last = tokenizer.get_vocab()["<bos>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", last)]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match="puts <bos> beside each text, and the model has no row"):
        trim_tokenizer(whole, needed_tokens(whole), rows=last)


def test_where_a_model_stops_is_needed(make_model) -> None:
    model = make_model("gpt2", eos_token_id=[3, 4], pad_token_id=7)
    model.generation_config.decoder_start_token_id = 9
    model.generation_config.suppress_tokens = [11]
    found = stated_ids(model.config.to_dict()) | stated_ids(model.generation_config.to_dict())
    assert found >= {3, 4, 7, 9}
    assert 11 not in found
    assert stated_ids({"text_config": {"bos_token_id": 5}, "eos_token_id": None}) == {5}


def test_tokens_of_pictures_that_are_not_kept_become_no_token(make_reader_of_pictures) -> None:
    model = make_reader_of_pictures(
        eos_token_id=3, boi_token_index=9, eoi_token_index=40, image_token_id=262144
    )
    assert stated_ids(model.config.to_dict()) >= {3, 9, 40}
    smaller = trim_model(model, range(3, 20))
    config = smaller.config
    assert (config.eos_token_id, config.boi_token_index) == (0, 6)
    assert (config.eoi_token_index, config.image_token_id) == (40, 262144)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(smaller(ids).logits, model(3 + ids).logits[..., 3:20])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bad_words_ids", [[90], [91, 92]]),
        ("sequence_bias", [[[90], 2.0]]),
        ("suppress_tokens", [90]),
        ("begin_suppress_tokens", [91]),
    ],
)
def test_a_model_whose_lists_become_empty_generates(make_model, key, value) -> None:
    model = make_model("gpt2")
    setattr(model.generation_config, key, value)
    smaller = trim_model(model, range(20))
    assert getattr(smaller.generation_config, key) is None
    ids = torch.tensor([[1, 2, 3]])
    assert smaller.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 3
