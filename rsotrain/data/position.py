"""Where in the data a run goes on: also with another batch size, or with sequences of another length.

The position is the number of sequences that training has taken. With another ``seq_len`` the packed
sequences are others, and the run goes on with the first that it has not seen whole: it counts whole epochs,
and in the present one the tokens that were taken. Shuffled sequences of another length come in an order of
their own, so then, as with another seed, some of the epoch's text comes again before the rest has come once;
``other_order`` says so.
"""

from collections.abc import Mapping
from typing import Any

from rsotrain.data.sequences import TrainingSequences
from rsotrain.errors import require

MOST_SEQUENCES = 2**62  # far more than any run takes, and what an int64 holds


def order_record(train: TrainingSequences, seed: int) -> dict[str, int | bool | str]:
    """What determines which sequence stands at which position, for a checkpoint."""
    return {"seed": seed, "seq_len": train.seq_len, **train.order_settings()}


def saved_position(saved: Mapping[str, Any], train: TrainingSequences, batch_size: int) -> int:
    """The position at which training goes on from a trainer's record.

    A record that has none is of a time when every step took ``batch_size`` sequences. Raises UserError for
    a record that makes no sense.
    """
    sequences = saved.get("sequences", saved["step"] * batch_size)
    order = saved.get("order", {})
    seq_len: Any = order.get("seq_len", train.seq_len) if isinstance(order, Mapping) else None
    for value, least in ((sequences, 0), (seq_len, 1)):
        require(
            type(value) is int and least <= value < MOST_SEQUENCES,
            "the checkpoint's record of its place in the data makes no sense; take another checkpoint, or"
            " the weights alone with checkpoint.load=weights",
        )
    return train.position_after(sequences, seq_len)


def epochs_taken(train: TrainingSequences, position: int) -> float | None:
    """How often the data have been gone through, in parts of an epoch; None where its length is not known."""
    per_epoch = train.sequences_per_epoch()
    return None if per_epoch is None else position / per_epoch


def began_to_repeat(train: TrainingSequences, before: int, after: int) -> bool:
    """Did the first sequence that training has taken twice come between two positions?

    It is so for one pair only of the positions that a run goes through, wherever it was stopped.
    """
    per_epoch = train.sequences_per_epoch()
    return per_epoch is not None and before <= per_epoch < after


def other_order(saved: Mapping[str, Any], train: TrainingSequences, seed: int) -> str | None:
    """What to tell of a run that goes on in another order than that of a trainer's record, if it does."""
    there: Mapping[str, Any] = saved.get("order", {})
    here = order_record(train, seed)
    differing = [key for key in here if key in there and there[key] != here[key]]
    in_file_order = here["streaming"] or here["packing"] == "padded" or not here["shuffle"]
    if not differing or (differing == ["seq_len"] and in_file_order):
        return None
    keys = [key if key in ("seed", "seq_len") else f"data.{key}" for key in differing]
    shown = ", ".join(
        f"{key} was {there[name]} and is {here[name]}" for key, name in zip(keys, differing, strict=True)
    )
    return (
        f"warning: {shown}: from here on the sequences come in another order, so some text of this epoch may"
        " come again before the rest has come once"
    )
