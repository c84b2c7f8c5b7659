"""Whether a fraction of the documents leaves some to train on and some to validate on."""

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from rsotrain.data.cache import Facts, cached_file
from rsotrain.data.documents import Corpus, Part, is_held_out
from rsotrain.errors import UserError


def settle_split(train: Corpus, held_out: Corpus, cache_dir: Path, *, may_cut: bool) -> tuple[Corpus, Corpus]:
    """The two parts of one corpus, neither of which is without documents.

    Documents are read until both parts have one: of a large corpus a few, and what has come out is kept in
    the cache. Where one part gets none, ``may_cut`` has the end of each document held out, as for a few books
    in text files. Otherwise raises UserError.
    """

    def build(_: BinaryIO) -> Facts:
        return _first_of_both(train)

    _, found = cached_file(cache_dir, "splits.txt", train.key(), build, lambda _: None)
    number, fraction = found["num_read"], train.fraction
    if number == 0 or (found["train"] and found["held_out"]):
        return train, held_out
    missing, advice = ("to train on", "lower") if found["held_out"] else ("to validate on", "raise")
    documents = f"{number:,} document{'s' * (number > 1)}"
    none = f"data.validation_fraction={fraction} leaves none of"
    if not may_cut:
        raise UserError(
            f"{none} the {documents} of {train.name} {missing}; {advice} it, or give data.validation_path=…"
        )
    note = f"{none} {documents} {missing}, so the end of each is held out"
    note = note if train.note is None else f"{train.note}; {note}"
    cut, end = (replace(part, by_ends=True, note=note) for part in (train, held_out))
    return cut, end


def _first_of_both(train: Corpus) -> Facts:
    """Whether each part has a document, and how many were read to find that out."""
    found: Facts = {"num_read": 0, "train": False, "held_out": False}
    for document in replace(train, part=Part.whole).documents(lambda _: None):
        found["num_read"] += 1
        found["held_out" if is_held_out(document, train.fraction) else "train"] = True
        if found["train"] and found["held_out"]:
            break
    return found
