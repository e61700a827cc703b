"""The draws of an evaluation for ``generate`` of transformers: the same continuations, token for token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from sparc3_lightning.evaluation.generation import Sampling, draw_tokens


class KeyedNoise(LogitsProcessor):
    """Leaves one token to ``generate``: the one that ``sparc3 evaluate`` draws there.

    It draws by itself, with temperature, nucleus and keyed Gumbel noise, whether ``do_sample`` is true or not; give
    neither temperature nor top-p to ``generate``. A generation config that changes logits, such as by a repetition
    penalty, changes the draws, which ``sparc3 evaluate`` does not let it do.

    Args:
        keys: Of each row that ``generate`` continues, from ``draw_keys``. With ``num_return_sequences``, which it takes
            only with ``do_sample``, the rows of one prompt follow each other.
        num_read: Tokens that each row has before the first draw, padding included.
        temperature: Temperature of sampling; 0 is greedy decoding.
        top_p: Probability mass of nucleus sampling.

    Raises:
        OptionError: If temperature or top-p make no sense.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparc3_lightning.evaluation.generation import draw_keys
        >>> sizes = {"vocab_size": 99, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> input_ids = torch.tensor([[1, 10, 20]])
        >>> noise = KeyedNoise(draw_keys(0, "prompt-1", 2, 2), num_read=3, temperature=0.7, top_p=0.9)
        >>> options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
        >>> len(model.generate(input_ids, logits_processor=[noise], **options))
        2
    """

    def __init__(self, keys: Sequence[int], num_read: int, temperature: float = 1.0, top_p: float = 1.0) -> None:
        self.keys = torch.tensor(keys)
        self.num_read = num_read
        self.sampling = Sampling(1, temperature, top_p)
        self.sampling.check()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return 0 for the token that is drawn in each row, and minus infinity for all others.

        Args:
            input_ids: Tokens so far, shape ``[rows, tokens]``.
            scores: Logits of the next one, shape ``[rows, vocabulary]``.

        Raises:
            ValueError: If there are not as many rows as keys, or a logit is NaN or infinite.
        """
        if len(scores) != len(self.keys):
            raise ValueError(f"KeyedNoise has {len(self.keys)} keys for {len(scores)} rows: give one key a row.")
        if not (scores < torch.inf).all():
            raise ValueError("The model gave logits that are NaN or infinite: nothing can be drawn from them.")
        step = input_ids.shape[1] - self.num_read
        drawn = draw_tokens(scores, self.keys.to(scores.device), step, self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0.0)
