"""Prompts as the numbers that text encoders read: CLIP's byte pairs (Sennrich 2016), T5's pieces (Kudo 2018), BERT's
(Schuster 2012).

    tokenise = ClipTokeniser("sd15/tokenizer")
    ids, mask, cut = tokenise(["a photo of a cat", ""])        # (2, 77) int32, (2, 77) bool, ("", "")
    tokenise = SentencePieceTokeniser("pixart/tokenizer", length=120)

Vocabularies come with published models; the code that applies them is that of the packages tokenizers and
sentencepiece, so ids are those of transformers' CLIPTokenizer, T5Tokenizer and BertTokenizer. What does not fit is cut
off, returned and said in a warning.
"""

import gzip
import importlib.util
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_PIECE_TOKENS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")

# Radford 2021's code: what is one word; letters stay together, digits do not
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES_USED = 49152 - 256 - 2  # of the many more in that file
_PACKAGES = ("open_clip", "clip")  # those that bring it

_INSTALL = "pip install 'diffjax[weights]'"


class Tokens(NamedTuple):
    """ids (B, L) int32; mask (B, L) bool, true where they are no padding; cut: of each text what did not fit, or ""."""

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[str, ...]


class _Enclosed:
    """Texts -> Tokens of `length`: a start token, at most length - 2 of the text, an end token, padding. What has this
    base sets the four numbers and _backend, a tokeniser of the package tokenizers."""

    length: int
    start: int
    end: int
    pad: int
    _backend: Any

    def __call__(self, texts: Sequence[str]) -> Tokens:
        _check_texts(texts)
        room = self.length - 2
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        fits = [len(line.ids) <= room for line in found]
        cut = ["" if fit else text[line.offsets[room][0] :] for text, line, fit in zip(texts, found, fits, strict=True)]
        return _tokens([[self.start, *line.ids[:room], self.end] for line in found], self.pad, self.length, cut)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the vocabulary has no {token!r}: get its files again, or name a padding token it has")
        return found


class ClipTokeniser(_Enclosed):
    """Texts -> Tokens of `length`: the start token, at most length - 2 of the text, the end token, padding.

    source: a folder of transformers' CLIPTokenizer (vocab.json and merges.txt, or tokenizer.json), or OpenAI's file
    bpe_simple_vocab_16e6.txt.gz; without one, that file of an installed open_clip or clip package. Both have the same
    vocabulary, but not the same padding: the end token, or "!", whose id is 0, for OpenCLIP's encoders (Stable
    Diffusion 2, the second of XL). A folder says which, and as in transformers a padding token that is in a text is
    read as such; `pad` says otherwise, for padding alone.

    Text is put in Unicode's composed form and lower case, nothing else: HTML and broken encodings are not mended.
    Raises FileNotFoundError where there is no vocabulary, ValueError for a damaged one.
    """

    def __init__(self, source: str | os.PathLike[str] | None = None, length: int = 77, pad: str | None = None):
        _check_length(length)
        files = _clip_files(Path(source) if source is not None else _installed_merges())
        self.length, self._backend = length, _clip_backend(files)
        self.start, self.end = self._id(files.named["bos_token"]), self._id(files.named["eos_token"])
        self.pad = self._id(files.named["pad_token"] if pad is None else pad)


class WordPieceTokeniser(_Enclosed):
    """Texts -> Tokens of `length`: [CLS], at most length - 2 of the text, [SEP], padding. BERT's; Devlin 2019.

    source: tokenizer.json, or vocab.txt, or a folder with one of them. Beside a vocab.txt, tokenizer_config.json may
    say do_lower_case = false; otherwise text is put in lower case without accents. Special tokens' names in a text
    ("[SEP]") are taken for those tokens, as in transformers. Raises as ClipTokeniser.
    """

    def __init__(self, source: str | os.PathLike[str], length: int = 512):
        _check_length(length)
        path = _one_of(Path(source), ("tokenizer.json", "vocab.txt"))
        self.length, self._backend = length, _word_pieces(path)
        self.start, self.end, self.pad = (self._id(token) for token in _WORD_PIECE_TOKENS[:3])


class SentencePieceTokeniser:
    """Texts -> Tokens of `length`: at most length - 1 of the text, the end token, padding. T5's; Raffel 2020.

    source: spiece.model, or tokenizer.json, or a folder with one of them. The former is read by sentencepiece itself,
    as when T5 was trained; the latter as transformers does, which differs from it for U+0085, for several accents on a
    letter, and for special tokens' names in a text ("</s>"), which it takes for those tokens. Raises as ClipTokeniser.
    """

    def __init__(self, source: str | os.PathLike[str], length: int = 120):
        if length < 2:
            raise ValueError(f"found length={length}, expected 2 at least: an end token is in it")
        path = _one_of(Path(source), ("spiece.model", "tokenizer.json"))
        self.length = length
        self._encode, self._decode, self.end, self.pad = _json_pieces(path) if path.suffix == ".json" else _pieces(path)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        _check_texts(texts)
        room = self.length - 1
        found = self._encode(list(texts))
        cut = [self._decode(ids[room:]) if len(ids) > room else "" for ids in found]
        return _tokens([[*ids[:room], self.end] for ids in found], self.pad, self.length, cut)


def _check_length(length: int) -> None:
    if length < 3:
        raise ValueError(f"found length={length}, expected 3 at least: a start and an end token are in it")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"found {texts if isinstance(texts, str) else list(texts)!r:.80}, expected a list of texts")


def _tokens(rows: list[list[int]], pad: int, length: int, cut: list[str]) -> Tokens:
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    if lost := [text for text in cut if text]:
        what = "; ".join(repr(text[:80]) for text in lost[:3])
        said = f"{len(lost)} of {len(rows)} texts have more than {length} tokens, and their ends are not read: {what}"
        warnings.warn(said, stacklevel=3)
    return Tokens(ids, mask, tuple(cut))


class _ClipFiles(NamedTuple):
    """vocabulary: piece -> id; merges: pairs of pieces; named: bos_token, ... -> token; added: tokens that are found in
    a text before it is cut into words, with how they are matched."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    named: dict[str, str]
    added: dict[str, dict[str, Any]]


def _clip_files(path: Path) -> _ClipFiles:
    if path.name.endswith(".gz"):
        packed = _bytes(path)
        try:
            text = gzip.decompress(packed).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from error
        merges = _merges(text, path)[:_MERGES_USED]
        letters = _alphabet()
        pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
        return _ClipFiles({piece: index for index, piece in enumerate(pieces)}, merges, *_special({}, {}, []))
    folder, listed = (path.parent if path.is_file() else path), []
    pairs = folder / "merges.txt"
    if (folder / "vocab.json").is_file() and pairs.is_file() and path.name != "tokenizer.json":
        vocabulary, merges = _json(folder / "vocab.json"), _merges(_bytes(pairs).decode("utf-8"), pairs)
    else:
        file = _one_of(folder, ("tokenizer.json", "vocab.json and merges.txt"))
        whole = _json(file)
        vocabulary, merges = (whole.get("model", {}).get(name) for name in ("vocab", "merges"))
        if not isinstance(vocabulary, dict) or not isinstance(merges, list):
            raise ValueError(f"{file} holds no byte pairs: it is of another tokeniser than CLIP's")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        listed = whole.get("added_tokens", [])
    said = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    return _ClipFiles(vocabulary, merges, *_special(*(_json(file) if file.is_file() else {} for file in said), listed))


def _special(
    config: dict[str, Any], old: dict[str, Any], listed: list[dict[str, Any]]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """`named` and `added` of _ClipFiles as transformers finds them. A tokenizer_config.json with added_tokens_decoder
    says all; before there was that, special_tokens_map.json (`old`) overruled it. listed: those of tokenizer.json."""
    if "added_tokens_decoder" in config:
        listed = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        config = {**config, **old}
    listed, added = {token["content"]: token for token in listed}, {}
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    for name, default in named.items():
        token = config.get(name) or default
        token = {**token, "special": True} if isinstance(token, dict) else {"content": token, "special": True}
        named[name] = token["content"]
        added[token["content"]] = token  # of several names of one token the last counts
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    found = {**added, **listed}
    return named, {name: {flag: token[flag] for flag in flags if flag in token} for name, token in found.items()}


def _clip_backend(files: _ClipFiles) -> Any:
    """Radford 2021's tokeniser on the package tokenizers."""
    tokenizers = _tokenizers()
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=files.vocabulary, merges=files.merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
            fuse_unk=False, unk_token=files.named["unk_token"],
        )
    )  # fmt: skip
    normalizers, words = tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = words.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = words.Sequence([split, words.ByteLevel(add_prefix_space=False)])
    backend.add_tokens([tokenizers.AddedToken(token, **flags) for token, flags in files.added.items()])
    return backend


def _installed_merges() -> Path:
    """OpenAI's file in a package that has it; the package is not imported, since that would import torch."""
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (file := Path(folder) / _MERGES_FILE).is_file():
                return file
    raise FileNotFoundError(
        f"CLIP's vocabulary is not installed: name a folder with vocab.json and merges.txt (the part tokenizer of a "
        f"published model), or OpenAI's {_MERGES_FILE}, or install a package that brings it, open_clip_torch"
    )


def _alphabet() -> list[str]:
    """A visible letter for each byte: those that have one, then the others, in OpenAI's order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def _merges(text: str, path: Path) -> list[tuple[str, str]]:
    """Pairs of pieces, one a line after a first line of comment."""
    # splitlines would break lines at letters of the alphabet
    pairs = [tuple(line.split(" ")) for line in text.split("\n")[1:] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is damaged: a line holds no pair of pieces; get it again")
    return pairs


def _pieces(path: Path) -> tuple[Any, Any, int, int]:
    """encode, decode and the ids of the end and of padding of a spiece.model."""
    processor = _sentencepiece().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_bytes(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged, or no model of sentencepiece ({error}): get it again") from error
    if processor.eos_id() < 0 or processor.pad_id() < 0:
        raise ValueError(f"{path} has no end token or no padding: it is not a model of T5")
    return processor.encode, processor.decode, processor.eos_id(), processor.pad_id()


def _json_pieces(path: Path) -> tuple[Any, Any, int, int]:
    """The same of a tokenizer.json."""
    _json(path)  # its errors say more
    backend = _tokenizers().Tokenizer.from_file(str(path))
    backend.no_padding()
    backend.no_truncation()
    end, pad = backend.token_to_id("</s>"), backend.token_to_id("<pad>")
    if end is None or pad is None:
        raise ValueError(f"{path} has no '</s>' or no '<pad>': it is of another tokeniser than T5's")
    encode = lambda texts: [line.ids for line in backend.encode_batch(texts, add_special_tokens=False)]  # noqa: E731
    return encode, backend.decode, end, pad


def _word_pieces(path: Path) -> Any:
    """BERT's tokeniser of a tokenizer.json or vocab.txt, on the package tokenizers."""
    tokenizers = _tokenizers()
    if path.suffix == ".json":
        kind = _json(path).get("model", {}).get("type")
        if kind != "WordPiece":
            raise ValueError(f"{path} holds a model {kind!r}, expected 'WordPiece': it is no tokeniser of BERT")
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        return backend
    said = path.parent / "tokenizer_config.json"
    lower = _json(said).get("do_lower_case", True) if said.is_file() else True
    # splitlines would break lines at pieces
    lines = _bytes(path).decode("utf-8").removesuffix("\n").split("\n")
    pieces = {line.removesuffix("\r"): index for index, line in enumerate(lines)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([token for token in _WORD_PIECE_TOKENS if token in pieces])
    return backend


def _one_of(path: Path, files: tuple[str, ...]) -> Path:
    """`path` itself, or the first of `files` in that folder."""
    if path.is_file():
        return path
    for file in files:
        if (path / file).is_file():
            return path / file
    have = sorted(file.name for file in path.iterdir())[:10] if path.is_dir() else "no such folder"
    raise FileNotFoundError(f"{path} holds no {', nor '.join(files)}; found {have}: give a model's folder tokenizer")


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent: name the file of a vocabulary")
    return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected names and values: get it again")
    return found


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"this tokeniser needs the package tokenizers: {_INSTALL}") from error
    return tokenizers


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(f"a spiece.model needs the package sentencepiece: {_INSTALL}") from error
    return sentencepiece
