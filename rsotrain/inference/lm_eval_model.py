"""The model that lm-eval asks, which begins texts as documents begin in training. Needs lm-eval."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


class SeparatorFirst(HFLM):
    """A text is predicted from the separator, which is the bos token of an exported folder.

    lm-eval itself puts it before the windows of a rolling task, where the tokenizer must not put another
    one: it would be scored as a target that no document has.
    """

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.add_bos_token = False
        try:
            scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return scores
        finally:
            self.add_bos_token = True

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **keywords: Any) -> list[int]:
        """As the base class, but a text that spells the bos token begins with the token all the same."""
        first = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids: list[int] = super().tok_encode(string, add_special_tokens=first, **keywords)
        return ids
