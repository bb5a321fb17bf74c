"""What adapters compute, in fewer products: folded into the weights, for a call or for good, and in fewer passes.

All of it is for use alone: gradients take the plain way (lora.py, gramsr.py), which gives the same up to rounding.
"""

import torch


def folding_pays(layer, x, C):
    """Whether `fold` and one product cost less than W x and B C A x.  layer, x, C: of lora.LoRA.forward

    Per rank, folding takes in * out products (in: with the kernel's pixels), the detour in + out for every position.
    """
    matrices = [C[name] for name in layer.on(C)]
    if not matrices or torch.is_grad_enabled():
        return False
    if any([torch.is_tensor(C_i) and len(C_i) > 1 for C_i in matrices]):
        return False            # each image has its own C, so each would need its own weight
    if x.is_cuda or torch.compiler.is_compiling():
        return True             # a GPU waits for launches, not for products; compiled, a size must not decide
    c_out, c_in = layer.weight.flatten(1).shape
    return layer.positions(x) * (c_in + c_out) > c_in * c_out


def fold(layer, C):
    """W + s B C A, summed over the adapters that are on; C: one for all images -> a new weight"""
    W = layer.weight.flatten(1)
    for name in layer.on(C):
        A, B = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
        CA = C[name][0].to(A) @ A if torch.is_tensor(C[name]) else A
        W = torch.addmm(W, B, CA, alpha=layer.s[name])
    return W.view_as(layer.weight)


@torch.no_grad()
def merge(network):
    """Fold all adapters of a network into its weights, for good, as if C were 1 for all of them in every call."""
    for layer in network.modules():
        if hasattr(layer, "lora_A"):
            layer.weight.data = fold(layer, dict.fromkeys(layer.lora_A, 1))
            layer.lora_A.clear(), layer.lora_B.clear()


def in_few_passes(residual, z, context, scales, sets, present):
    """GramSR's l1 e_p + l2 (e_ps - e_p) + l3 (e_all - e_ps), sorted by passes; what counts 0 times needs none.

    residual: (z, context, *sets) -> e; scales: l; sets: pixel, semantic, texture; present: those that the model has
    """
    (l1, l2, l3), (pixel, semantic, texture) = scales, sets
    if semantic not in present:     # then e_ps is e_p, whatever its scale
        l2 = l1
    if texture not in present:
        l3 = l2
    e = torch.zeros_like(z)
    if l1 != l2:
        e = e + (l1 - l2) * residual(z, context, pixel)
    if l2 != l3:
        e = e + (l2 - l3) * residual(z, context, pixel, semantic)
    if l3 != 0:
        e = e + l3 * residual(z, context, pixel, semantic, texture)
    return e
