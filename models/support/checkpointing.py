"""Less memory in training: intermediate results are computed again in backward instead of being kept."""

import torch
from torch.utils.checkpoint import checkpoint


class Checkpointing:
    """Lets a network run its parts in less memory; a mixin. self.run(part, *args) is part(*args).

    With self.checkpointing, training keeps only the part's input, and computes the part again in backward.
    """

    checkpointing = False

    def run(self, part, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)
