"""Tokenisers against transformers' on small vocabularies made here, in every layout in which folders hold them."""

import gzip
import io
import json
import warnings

import numpy as np
import pytest

from diffjax.data.tokenisers import END, START, ClipTokeniser, SentencePieceTokeniser, WordPieceTokeniser

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'diffjax[weights]'")

SENTENCES = [
    "a photo of a cat sitting on the mat", "an astronaut riding a horse on mars, highly detailed, 4k",
    "the quick brown fox jumps over the lazy dog!", "they're here; it's we'll don't I'd I've I'm",
    "naïve café crème brûlée", "中文 测试 text", "привет мир", "hello world? hello!",
]  # fmt: skip
TEXTS = [
    *SENTENCES, "", "   ", " \t\n a  PHOTO\u00a0of\u2003a\u0085CAT ", "IT'S 'S don'T", "catcat photophoto", "!!! ! hi!",
    "🐈‍⬛ cat 👩🏽‍🚀🎉🎉 end", "e\u0301\u0301 caf\u00e9 ﬁ Ⅷ ２３ ½ ² 𝔘𝔫𝔦 𝟘𝟙", "عربي हिन्दी ไทย 한국어 日本",
    "İstanbul ΣΑΣ ẞ ǅ \u0345", "x1y22 $%#@! foo_bar-baz 1,000.50", "a " * 30, "z" * 70, "🐈" * 40,
    "a\u200bb\u200d\ufeffc \x00\x01\x7f", "&lt;b&gt; &amp;",
]  # fmt: skip
LENGTH = 24


def write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        name, text = name.replace("__", "."), content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def byte_pairs():
    """(vocabulary, merges as lines) in OpenAI's order: bytes, bytes that end a word, merges, special tokens."""
    words, model = tokenizers.pre_tokenizers, tokenizers.models.BPE(end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    in_bytes = words.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = words.Sequence([words.Whitespace(), in_bytes])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    assert len(merges) > 50
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    assert sorted(letters) == sorted(words.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in merges]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *merged, START, END]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, merges


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def layouts(vocabulary):
    """Configs as published folders have them. The two of the second and third do not agree about padding."""
    start, end = token(START, normalized=True), token(END)
    names = {"bos_token": START, "eos_token": END, "unk_token": END}
    decoder = {"0": token("!", special=True), str(vocabulary[START]): start, str(vocabulary[END]): end}
    sd1 = {"bos_token": start, "eos_token": end, "unk_token": token(END, normalized=True), "pad_token": END}
    return {
        "none": {},
        "stable diffusion 1": {"special_tokens_map__json": sd1, "tokenizer_config__json": {"pad_token": END}},
        "stable diffusion 2": {
            "special_tokens_map__json": sd1 | {"pad_token": "!"},
            "tokenizer_config__json": {"pad_token": END, "bos_token": {"__type": "AddedToken", **start}},
        },
        "stable diffusion xl": {
            "special_tokens_map__json": names | {"pad_token": END},
            "tokenizer_config__json": names | {"pad_token": "!", "added_tokens_decoder": decoder},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "transformers is not installed: pip install 'diffjax[test]'"
        package = pytest.importorskip("transformers", reason=reason)
        for name in ("CLIPTokenizer", "T5Tokenizer", "BertTokenizer"):
            getattr(package, name)
    return package


def assert_same(found, tokeniser, texts, length=LENGTH):
    expected = tokeniser(list(texts), padding="max_length", max_length=length, truncation=True)
    for text, ids, mask, other, other_mask in zip(
        texts, found.ids, found.mask, expected["input_ids"], expected["attention_mask"], strict=True
    ):
        assert ids.tolist() == other and mask.astype(int).tolist() == other_mask, text


@pytest.mark.parametrize("layout", ["none", "stable diffusion 1", "stable diffusion 2", "stable diffusion xl"])
def test_clip_equals_transformers(transformers, byte_pairs, tmp_path, layout):
    vocabulary, merges = byte_pairs
    lines = "\n".join(["#version: 0.2", *merges, ""])
    folder = write(tmp_path / "tokenizer", vocab__json=vocabulary, merges__txt=lines, **layouts(vocabulary)[layout])
    reference, ours = transformers.CLIPTokenizer.from_pretrained(folder), ClipTokeniser(folder, length=LENGTH)
    texts = [*TEXTS, f"a {END} b{START} c", f"{START.upper()} d {END.upper()}"]
    with pytest.warns(UserWarning, match="their ends are not read"):
        found = ours(texts)
    assert_same(found, reference, texts)
    pad = vocabulary["!"] if layout in ("stable diffusion 2", "stable diffusion xl") else vocabulary[END]
    assert ours.pad == pad and found.ids.dtype == np.int32 and found.mask.dtype == bool
    # what newer versions write: tokenizer.json alone
    reference.save_pretrained(tmp_path / "newer")
    assert not (tmp_path / "newer" / "vocab.json").exists()
    with pytest.warns(UserWarning):
        newer = ClipTokeniser(tmp_path / "newer", length=LENGTH)(texts)
    np.testing.assert_array_equal(newer.ids, found.ids)
    assert_same(newer, transformers.CLIPTokenizer.from_pretrained(tmp_path / "newer"), texts)


@pytest.mark.fast
def test_clip_by_hand(byte_pairs, tmp_path):
    """The start, words, the end, padding; what does not fit is said, in its own words."""
    vocabulary, merges = byte_pairs
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges, ""]).encode()))
    ours = ClipTokeniser(file, length=8)
    ids, mask, cut = ours(["A photo!", ""])
    words = [START, "a</w>", "photo</w>", "!</w>", END]
    assert ids[0].tolist() == [vocabulary[word] for word in words] + [vocabulary[END]] * 3
    assert ids[1].tolist() == [vocabulary[START]] + [vocabulary[END]] * 7
    assert mask.tolist() == [[True] * 5 + [False] * 3, [True] * 2 + [False] * 6] and cut == ("", "")
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 8 tokens, and their ends are not.*: 'The CAT'"):
        ids, mask, cut = ours(["a", "A photo of a cat on The CAT"])
    assert cut == ("", "The CAT") and mask[1].all() and ids[1, -1] == vocabulary[END]
    assert ours(["a a a a a a"]).cut == ("",)
    with pytest.warns(UserWarning):
        assert ours(["a a a a a a A"]).cut == ("A",)
    # padding alone: "!" in a text stays a word
    ids, mask, _ = ClipTokeniser(file, length=8, pad="!")(["A photo!"])
    assert ids[0].tolist() == [vocabulary[word] for word in words] + [vocabulary["!"]] * 3 and mask[0].sum() == 5


def test_the_vocabulary_of_an_installed_package(byte_pairs, tmp_path, monkeypatch):
    vocabulary, merges = byte_pairs
    monkeypatch.setattr("diffjax.data.tokenisers._PACKAGES", ("package_of_a_vocabulary",))
    with pytest.raises(FileNotFoundError, match="CLIP's vocabulary is not installed: name a folder.*open_clip_torch"):
        ClipTokeniser()
    package = write(tmp_path / "package_of_a_vocabulary", __init____py="raise RuntimeError('imported')")
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(["", *merges]).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    found = ClipTokeniser(length=5)(["cat"]).ids
    assert found.tolist() == [[vocabulary[word] for word in (START, "cat</w>", END, END, END)]]


@pytest.fixture(scope="module")
def pieces():
    """A model of sentencepiece with the special tokens and the normalisation of T5's."""
    reason = "sentencepiece is not installed: pip install 'diffjax[weights]'"
    package = pytest.importorskip("sentencepiece", reason=reason)
    file = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=file, vocab_size=150, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


def test_t5_equals_transformers(transformers, pieces, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(pieces)
    reference, ours = transformers.T5Tokenizer.from_pretrained(folder), SentencePieceTokeniser(folder, length=LENGTH)
    # transformers takes U+0085 for a space, sentencepiece for a letter: of 131,072 code points it is the only such one;
    # and transformers drops a second accent
    plain = [text.replace("\u0085", " ").replace("\u0301\u0301", "\u0301") for text in TEXTS]
    with pytest.warns(UserWarning, match="their ends are not read"):
        found = ours(plain)
    assert_same(found, reference, plain)
    assert (ours.pad, ours.end) == (0, 1) and found.ids[TEXTS.index("")].tolist() == [1] + [0] * (LENGTH - 1)
    reference.save_pretrained(tmp_path / "newer")
    newer = SentencePieceTokeniser(tmp_path / "newer", length=LENGTH)
    texts = [*TEXTS, "a </s> b <extra_id_0> c"]
    with pytest.warns(UserWarning):
        assert_same(newer(texts), reference, texts)
    assert (newer.pad, newer.end) == (0, 1)


def test_t5_says_what_it_cuts(pieces, tmp_path):
    (tmp_path / "spiece.model").write_bytes(pieces)
    ours = SentencePieceTokeniser(tmp_path / "spiece.model", length=4)
    with pytest.warns(UserWarning, match="2 of 3 texts have more than 4 tokens") as caught:
        ids, mask, cut = ours(["", "hello world? hello!", "the cat sitting on the mat"])
    assert caught[0].filename == __file__
    assert SentencePieceTokeniser(tmp_path, length=len(ours._encode("the cat")) + 1)(["the cat"]).cut == ("",)
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        SentencePieceTokeniser(tmp_path, length=len(ours._encode("the cat")))(["the cat"])
    assert (ids[1:, -1] == 1).all() and mask.sum(axis=1).tolist() == [1, 4, 4]
    assert cut[0] == "" and cut[1].endswith("hello!") and cut[2].endswith("mat") and "sitting on the mat" not in ids[2]


@pytest.fixture(scope="module")
def word_pieces():
    """BERT's special tokens, then pieces of the sentences, as the lines of a vocab.txt."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    found = backend.get_vocab()
    return sorted(found, key=found.get)


@pytest.mark.parametrize("lower", [True, False])
def test_bert_equals_transformers(transformers, word_pieces, tmp_path, lower):
    """Of its vocab.txt, and of the tokenizer.json that transformers writes."""
    config = {"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}
    folder = write(tmp_path / "tokenizer", vocab__txt="\n".join([*word_pieces, ""]), tokenizer_config__json=config)
    reference = transformers.BertTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "a [SEP] b [MASK] c", "CAT Café"]
    with pytest.warns(UserWarning, match="their ends are not read"):
        found = WordPieceTokeniser(folder, length=LENGTH)(texts)
    assert_same(found, reference, texts)
    assert found.ids.dtype == np.int32 and found.mask.dtype == bool and (found.ids == word_pieces.index("[UNK]")).any()
    reference.save_pretrained(tmp_path / "newer")
    newer = WordPieceTokeniser(tmp_path / "newer" / "tokenizer.json", length=LENGTH)
    with pytest.warns(UserWarning):
        assert_same(newer(texts), reference, texts)


@pytest.mark.fast
def test_bert_by_hand(tmp_path):
    """Words in pieces, longest first; an unknown word is one token; what does not fit is said."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [*special, "a", "hand", "##written", "seven", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    ours = WordPieceTokeniser(tmp_path, length=8)
    ids, mask, cut = ours(["A handwritten Sevens", "a frog", ""])
    said = [["[CLS]", "a", "hand", "##written", "seven", "##s", "[SEP]"], ["[CLS]", "a", "[UNK]", "[SEP]"], ["[CLS]", "[SEP]"]]
    for row, expected in zip(ids, said, strict=True):
        assert [pieces[i] for i in row] == expected + ["[PAD]"] * (8 - len(expected))
    assert mask.sum(axis=1).tolist() == [7, 4, 2] and cut == ("", "", "")
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 5 tokens.*'sevens'"):
        assert WordPieceTokeniser(tmp_path, length=5)(["a handwritten sevens"]).cut == ("sevens",)
    with pytest.raises(ValueError, match="expected 3 at least"):
        WordPieceTokeniser(tmp_path, length=2)
    with pytest.raises(ValueError, match=r"the vocabulary has no '\[CLS\]'"):
        WordPieceTokeniser(write(tmp_path / "other", vocab__txt="a\nb\n[UNK]"))
    with pytest.raises(ValueError, match="holds a model 'BPE', expected 'WordPiece'"):
        WordPieceTokeniser(write(tmp_path / "pairs", tokenizer__json={"model": {"type": "BPE"}}))
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, nor vocab.txt"):
        WordPieceTokeniser(write(tmp_path / "empty"))


def test_bad_input_is_refused(byte_pairs, pieces, tmp_path):
    vocabulary, merges = byte_pairs
    good = write(tmp_path / "good", vocab__json=vocabulary, merges__txt="\n".join(["#", *merges]))
    ours = ClipTokeniser(good)
    for texts in ("a cat", ["a", None]):
        with pytest.raises(ValueError, match="expected a list of texts"):
            ours(texts)
    with pytest.raises(ValueError, match="expected 3 at least"):
        ClipTokeniser(good, length=2)
    with pytest.raises(ValueError, match="the vocabulary has no '<nothing>'"):
        ClipTokeniser(good, pad="<nothing>")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json, nor vocab.json and merges.txt; found \['vocab"):
        ClipTokeniser(write(tmp_path / "half", vocab__json=vocabulary))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ClipTokeniser(tmp_path / "absent")
    with pytest.raises(ValueError, match="merges.txt is damaged"):
        ClipTokeniser(write(tmp_path / "merges", vocab__json=vocabulary, merges__txt="#\na b c\n"))
    (tmp_path / "half" / "merges.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="merges.gz is damaged"):
        ClipTokeniser(tmp_path / "half" / "merges.gz")
    with pytest.raises(ValueError, match="vocab.json is damaged"):
        ClipTokeniser(write(tmp_path / "json", vocab__json="{", merges__txt="#\na b\n"))
    with pytest.raises(ValueError, match="holds no byte pairs"):
        ClipTokeniser(write(tmp_path / "pieces", tokenizer__json={"model": {"vocab": [["a", 1.0]]}}))
    (tmp_path / "half" / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="spiece.model is damaged"):
        SentencePieceTokeniser(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="holds no spiece.model, nor tokenizer.json"):
        SentencePieceTokeniser(good)
