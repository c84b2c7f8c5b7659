"""A SentencePiece model as the tokenizer.json that ``transformers`` reads."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from rsotrain.data.tokenizer import SPACE_MARK, WORD, SentencePieceTokenizer

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType, where CHAR is 4
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type


def to_tokenizer_json(tokenizer: SentencePieceTokenizer) -> str | None:
    """The description, or None for a model that ``tokenizers`` cannot run as SentencePiece does.

    None is returned for models of whole words, for models with unused pieces or with the name of a special
    piece that cannot be told from text, and for models with a character map: ``tokenizers`` applies one by
    grapheme clusters, and composes or drops other combining characters than SentencePiece does.
    """
    from tokenizers import Tokenizer

    proto = tokenizer.proto
    normalizer = proto.normalizer_spec
    types = {piece.type for piece in proto.pieces}
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if (
        proto.trainer_spec.model_type == WORD
        or normalizer.precompiled_charsmap
        or not normalizer.escape_whitespaces
        or UNUSED in types
        or (normalizer.remove_extra_whitespaces and any(SPACE_MARK in piece for piece in user_defined))
    ):
        return None
    # A model that spells the space mark in bytes has the space itself in its pieces: the mark is then an
    # unknown character like any other.
    space = " " if tokenizer.keeps_space_marks else SPACE_MARK
    pieces = [(*_renamed(p.piece, p.type, space), p.score) for p in proto.pieces]
    if len({piece for piece, *_ in pieces}) < len(pieces) or (SPACE_MARK, UNUSED) in [p[:2] for p in pieces]:
        return None
    user_defined = [piece for piece, kind, _ in pieces if kind == USER_DEFINED]
    unigram = proto.trainer_spec.model_type == UNIGRAM
    splits = []
    if unigram or user_defined:
        cut = _cut_special_names(pieces, proto.trainer_spec.byte_fallback)
        if cut is None:
            return None
        splits.append(cut)
    if user_defined and not unigram:
        longest_first = sorted(user_defined, key=len, reverse=True)
        splits.append(_split("|".join(re.escape(piece) for piece in longest_first), "isolated"))
    backend = Tokenizer(_model(pieces, proto.trainer_spec, ignore_merges=bool(user_defined)))
    _set_spaces(backend, normalizer, space, suffix=proto.trainer_spec.treat_whitespace_as_suffix)
    _set_rest(backend, pieces, splits, tokenizer.eos_id)
    return str(backend.to_str(pretty=True))


def _renamed(piece: str, kind: int, space: str) -> tuple[str, int]:
    """A piece with its spaces as ``space``, and its type.

    A symbol that was defined with a space in it, and not with the mark of one, is in no text for
    SentencePiece; it takes a name and a type that none finds here.
    """
    if kind not in (NORMAL, USER_DEFINED):
        return piece, kind
    if space == " " and " " in piece:
        return piece.replace(" ", SPACE_MARK), UNUSED
    return piece.replace(SPACE_MARK, space), kind


def text_score(piece: str, kind: int, score: float) -> float:
    """The score of a piece in a unigram model; user-defined ones have a bonus for each byte."""
    if kind == NORMAL:
        return score
    return 0.1 * (len(piece.replace(" ", SPACE_MARK).encode()) - 1)


def _model(pieces: list[tuple[str, int, float]], spec: Any, *, ignore_merges: bool) -> Any:
    from tokenizers import models

    unknown = next(i for i, (_, kind, _) in enumerate(pieces) if kind == UNKNOWN)
    if spec.model_type == UNIGRAM:
        scores = [score for _, kind, score in pieces if kind == NORMAL]
        # The unknown character costs what the least of all scores says, so no special piece may have less.
        least = min(scores, default=0.0)
        return models.Unigram(
            [
                (piece, text_score(piece, kind, score) if kind in (NORMAL, USER_DEFINED) else least)
                for piece, kind, score in pieces
            ],
            unk_id=unknown,
            byte_fallback=spec.byte_fallback,
        )
    normal = {p: (score, i) for i, (p, kind, score) in enumerate(pieces) if kind == NORMAL}
    return models.BPE(
        {piece: i for i, (piece, *_) in enumerate(pieces)},
        _merges(normal) if spec.model_type == BPE else [],
        unk_token=pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=ignore_merges,  # user-defined pieces, which nothing is merged into
    )


def _merges(pieces: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, the best-scored piece first, as BPE tries them.

    pieces: piece -> (score, id).
    """
    merges = [
        (-score, number, *_order(pieces, piece[:cut], piece[cut:]), piece[:cut], piece[cut:])
        for piece, (score, number) in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _order(pieces: dict[str, tuple[float, int]], left: str, right: str) -> tuple[int, int]:
    return pieces[left][1], pieces[right][1]


def _set_spaces(backend: Any, spec: Any, space: str, *, suffix: bool) -> None:
    """What SentencePiece does to spaces, in its order, and undoes when it decodes."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:  # runs first, so that no pattern looks at a long one twice
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A "), "")]
    if space != " ":
        steps.append(normalizers.Replace(" ", space))
    at_end = rf"{space}+\z" if spec.remove_extra_whitespaces else ""
    if spec.add_dummy_prefix and suffix:
        pattern = rf"(?m)(?<!{space})(?:{at_end}|(?<=.)\z)" if at_end else r"(?m)(?<=.)\z"
        steps.append(normalizers.Replace(Regex(pattern), space))
    elif at_end:
        steps.append(normalizers.Replace(Regex(rf"(?<!{space}){at_end}"), ""))
    undo: list[Any] = []
    if spec.add_dummy_prefix and suffix:
        undo = [decoders.Replace(Regex(r" \z"), "")]
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
        undo = [decoders.Strip(" ", 1, 0)]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    spaces = [decoders.Replace(space, " ")] if space != " " else []
    backend.decoder = decoders.Sequence([*spaces, decoders.ByteFallback(), decoders.Fuse(), *undo])


def _set_rest(backend: Any, pieces: list[tuple[str, int, float]], splits: list[Any], bos: int) -> None:
    """Splits before the model, special tokens, and the separator before each text."""
    from tokenizers import AddedToken, pre_tokenizers

    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, kind, _ in pieces
            if kind in (CONTROL, UNKNOWN)
        ]
    )
    backend.post_processor = separator_first(pieces[bos][0], bos)


def separator_first(token: str, number: int) -> Any:
    """The post-processor that begins each text as every document begins in training."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, number)]
    )


def _cut_special_names(pieces: list[tuple[str, int, float]], byte_fallback: bool) -> Any | None:
    """Splits a text that spells the name of a special piece, so that the model cannot find the piece there.

    Each name is cut between two characters that no piece has side by side, where the cut changes nothing
    else; None where a name has no such place.
    """
    text = [piece for piece, kind, _ in pieces if kind in (NORMAL, USER_DEFINED)]
    adjacent = {piece[i : i + 2] for piece in text for i in range(len(piece) - 1)}
    known = {piece for piece in text if len(piece) == 1}
    cuts: dict[str, list[str]] = defaultdict(list)
    for name in (piece for piece, kind, _ in pieces if kind not in (NORMAL, USER_DEFINED) and len(piece) > 1):
        # between two unknown characters a cut would make two unknown pieces of one
        places = (
            i
            for i in range(1, len(name))
            if name[i - 1 : i + 1] not in adjacent and (byte_fallback or known & {name[i - 1], name[i]})
        )
        place = next(places, None)
        if place is None:
            return None
        cuts[name[:place]].append(name[place:])
    return _split("|".join(_before(head, tails) for head, tails in cuts.items()), "merged_with_previous")


def _before(head: str, tails: Iterable[str]) -> str:
    return f"{re.escape(head)}(?={'|'.join(re.escape(tail) for tail in tails)})"


def _split(pattern: str, behavior: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), behavior)
