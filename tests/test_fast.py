"""Every fast way equals what it stands in for. Run: python -m pytest tests/test_fast.py

Each function below builds one case: -> the plain result, and the fast one, which must agree.
"""

import pytest
import torch
from test_vosr import inputs, make, make_dit

from models.flow import guided
from models.support.tokens import FixedTokens


def fixed_tokens():
    """Keys and values kept for several times, under guidance and without."""
    (z_t, z_lq, feat), dit = inputs(), make_dit()
    fixed, times, strengths = FixedTokens(dit), (1.0, 0.6, 0.2), (1.0, 0.5, 0.0)
    plain = [guided(dit, z_t, z_lq, feat, t, 0, g) for t, g in zip(times, strengths)]
    fast = []
    for t, g in zip(times, strengths):
        with fixed(feat) as tokens:
            fast.append(guided(dit, z_t, z_lq, tokens, t, 0, g))
    return torch.stack(plain), torch.stack(fast)


def fixed_tokens_of_others():
    """Tokens that change from call to call, as tiles do, and come again."""
    (z_t, z_lq, feat), dit = inputs(4), make_dit()
    fixed, parts = FixedTokens(dit), [slice(0, 2), slice(2, 4), slice(0, 2), slice(3, 4), slice(3, 4)]
    plain = [guided(dit, z_t[n], z_lq[n], feat[n], 0.7, 0, 0.3) for n in parts]
    fast = []
    for n in parts:
        with fixed(feat[n]) as tokens:
            fast.append(guided(dit, z_t[n], z_lq[n], tokens, 0.7, 0, 0.3))
    return torch.cat(plain), torch.cat(fast)


def fixed_tokens_of_a_preconditioned_transformer():
    (z_t, z_lq, feat), dit = inputs(), make().dit
    with FixedTokens(dit)(feat) as tokens:
        fast = guided(dit, z_t, z_lq, tokens, 0.4, 0, 0.5)
    return guided(dit, z_t, z_lq, feat, 0.4, 0, 0.5), fast


FAST = [fixed_tokens, fixed_tokens_of_others, fixed_tokens_of_a_preconditioned_transformer]


@torch.no_grad()
@pytest.mark.parametrize("way", FAST, ids=lambda way: way.__name__)
def test_fast_equals_plain(way):
    plain, fast = way()
    assert plain.std() > 0.01
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_fixed_tokens_are_looked_up_once_and_leave_no_trace():
    (z_t, z_lq, feat), dit, looked_up = inputs(), make_dit(), []
    for block in dit.blocks:
        block.cross_attn.k_linear.register_forward_hook(lambda *_: looked_up.append(1))
    names, fixed = list(dit.state_dict()), FixedTokens(dit)
    for t in (1.0, 0.5, 0.2):
        with fixed(feat) as tokens:
            guided(dit, z_t, z_lq, tokens, t, 0, 0.5)
    assert len(looked_up) == len(dit.blocks) and list(dit.state_dict()) == names
    with pytest.raises(ValueError), fixed(feat):
        raise ValueError("also after an error")
    assert list(dit.state_dict()) == names
