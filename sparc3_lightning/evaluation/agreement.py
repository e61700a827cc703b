"""How far several judges of the same texts agree."""

import math

from torch import Tensor


def krippendorff_alpha(scores: Tensor) -> float:
    """Return Krippendorff's alpha of scores at interval level, 1 less the observed over the expected disagreement.

    A disagreement is the squared difference of two scores. Observed are those of different judges of one text, where a
    text that m judges scored weighs m; expected are those of any two of these scores. 1 is perfect agreement, 0 that of
    chance, and below 0 lies less than that.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D; Hayes & Krippendorff 2007.

    Args:
        scores: Shape ``[judges, texts]``; NaN where a judge has no score of a text. A text with fewer than two scores
            has no part in it.

    Returns:
        At most 1; NaN if no text has two scores, or if all scores are the same.

    Example:
        >>> import torch
        >>> krippendorff_alpha(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]]))
        1.0
    """
    scores_JT = scores.double().where(scores.isfinite(), math.nan)
    scores_JT = scores_JT[:, scores_JT.isfinite().sum(dim=0) > 1]
    is_scored_JT = scores_JT.isfinite()
    found = scores_JT[is_scored_JT]
    if len(found) == 0 or (found == found[0]).all():
        return math.nan
    number_T = is_scored_JT.sum(dim=0)
    spread_T = (scores_JT - scores_JT.nanmean(dim=0)).square().nansum(dim=0)
    # Over all ordered pairs of m values, squared differences add up to 2 m times their spread around the mean.
    observed = (2 * number_T * spread_T / (number_T - 1)).sum() / len(found)
    expected = 2 * (found - found.mean()).square().sum() / (len(found) - 1)
    return (1 - observed / expected).item()
