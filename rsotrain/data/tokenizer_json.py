"""A SentencePiece model as the tokenizer.json that ``transformers`` reads."""

from typing import Any

from rsotrain.data.tokenizer import SPACE_MARK

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NEVER = -1e4  # the score of pieces that are no text, though a text may spell them
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type


def to_tokenizer_json(model: bytes) -> str | None:
    """The description, or None for a model whose normalisation it cannot express (T5's, say).

    Texts that hold the character U+2581 itself are encoded as if it were a space.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    normalizer = proto.normalizer_spec
    if (
        normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
    ):
        return None
    pieces = proto.pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    unknown = next(piece.piece for piece in pieces if piece.type == UNKNOWN)
    backend: Any
    if proto.trainer_spec.model_type == BPE:
        backend = models.BPE(
            ids,
            _merges({p.piece: (p.score, i) for i, p in enumerate(pieces) if p.type == NORMAL}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    elif proto.trainer_spec.model_type == UNIGRAM:
        backend = models.Unigram(
            [(p.piece, p.score if p.type == NORMAL else NEVER) for p in pieces],
            unk_id=ids[unknown],
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    else:
        return None
    tokenizer = Tokenizer(backend)
    prepend = [normalizers.Prepend(SPACE_MARK)] if normalizer.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE_MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    return tokenizer.to_str(pretty=True)


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
