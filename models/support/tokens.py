"""Visual tokens that stay: DiT's cross-attention (dit.py) in fewer products, with the same result.

In a flow of many steps the visual tokens are the same in every step, and so are their keys and values, in all blocks.
The weak branch of guidance has no visual tokens: they are zeros, all equal. Among equal keys softmax has no choice, and
any average of equal values is that value, so cross-attention adds the same vector to every token: a constant.

Letters: n latents with visual tokens, M of them each; B >= n latents in all; nh heads of hd channels; D = nh * hd.
"""

import torch
import torch.nn as nn

from models.support.graphs import Graphs, shapes


class FixedAttention(nn.Module):
    """Stands in a block in place of its cross-attention (a `CrossAttention`); keys and values are known already."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        # k, v, each (n, nh, M, hd), of the first n latents; (D,) constant of the others, which have no tokens
        self.fixed = None

    def forward(self, x, ctx):
        """x: (B, N, D), of which the first n have visual tokens; ctx is not read -> (B, N, D)"""
        k, v, constant = self.fixed
        n = len(k)
        y = self.attention.attend(x[:n], k, v)
        if n == len(x):
            return y
        return torch.cat([y, constant.expand(len(x) - n, x.shape[1], -1)])


class FixedTokens:
    """Computes keys and values of visual tokens once for as long as the tokens are the same.

        fixed = FixedTokens(dit)
        same_dit = fixed.dit_with(feat)     # feat: (n, M, z_dims)
        same_dit(z_t, z_lq, feat, t, r)     # as dit(z_t, z_lq, feat, t, r); of z_t the first n latents have feat

    Keys and values are kept for the last feat only: they take 235 MB a latent of 64 x 64 cells (0.5B, float32). One
    user of the DiT at a time; no gradients.
    """

    def __init__(self, dit):
        self.dit, self.feat, self.shapes = dit, None, ""
        self.attentions = [FixedAttention(block.cross_attn) for block in dit.blocks]
        self.graphs = dit._compiled_call_impl if isinstance(dit._compiled_call_impl, Graphs) else None

    def dit_with(self, feat):
        """Make the DiT a function that knows feat's keys and values; it holds until the next call of `dit_with`.

        feat: (n, M, z_dims) -> a function like `DiT.forward`. Of its latents the first n have these tokens, all others
        none, and the tokens that it is given are not read.
        """
        # The same address is the same tensor: self.feat keeps its memory, so no other tensor can lie there.
        if self.feat is None or (feat.data_ptr(), feat.shape) != (self.feat.data_ptr(), self.feat.shape):
            self.look_up(feat)
        return self.run

    def run(self, z_t, z_lq, feat, t, r=None):
        """Run the DiT with the fixed attentions in their places. It gets no tokens, so it computes none in vain."""
        self.swap(True)
        try:
            return self.dit(z_t, z_lq, self.feat[:, :0], t, r)
        finally:
            self.swap(False)

    @torch.no_grad()
    def look_up(self, feat):
        """Compute keys, values and the constant of every block, for feat: (n, M, z_dims)."""
        for attention in self.attentions:
            attention.fixed = None      # room for the new ones
        dit = self.dit
        ctx = dit.mlp_ca(dit.layer_norm(feat))
        no_ctx = dit.mlp_ca(dit.layer_norm.bias)    # (D,) of a token of zeros, whose layer norm is the bias
        fixed = []      # for each block
        for block in dit.blocks:
            k, v = block.cross_attn.keys_values(ctx)
            constant = block.cross_attn.proj(block.cross_attn.v_linear(no_ctx))
            fixed.append((k, v, constant))
        if self.graphs:     # CUDA graphs read where they were recorded: copy everything to that same place
            fixed = self.graphs.keep(fixed)
        for attention, of_block in zip(self.attentions, fixed):
            attention.fixed = of_block
        self.feat, self.shapes = feat, shapes(fixed)

    def swap(self, fixed):
        """Put the fixed attentions in their places, or the DiT's own."""
        for block, attention in zip(self.dit.blocks, self.attentions):
            block.cross_attn = attention if fixed else attention.attention
        if self.graphs:
            self.graphs.reads = self.shapes if fixed else ""
