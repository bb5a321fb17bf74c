"""3x3 convolutions with a quarter of the multiplications, for float32 on CPUs, without gradients.

Paper: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 1509.09308: Winograd's F(4x4, 3x3).

Cut the image into patches d of 6x6 pixels that overlap by two; the kernel g turns each into 4x4 results. Directly these
take 16 x 9 = 144 products. Winograd: Y = A^T [(G g G^T) * (B^T d B)] A, where * multiplies 6x6 numbers one by one: 36
products. Summed over channels these are 36 matrix products; G, B, A hold small numbers, so the rest is mostly sums.

Left out: training, half precision and GPUs, whose libraries choose such algorithms by themselves.
"""

from functools import partial

import torch
import torch.nn.functional as F

cpu_tensor = partial(torch.tensor, device="cpu")
B_T = cpu_tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                  [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1.0]])
G = cpu_tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24.0]]) / 24
A_T = cpu_tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1.0]])
AT_ONCE = 2**21     # transformed numbers of a strip: 8 MB, which stay in a processor's cache


def conv3x3_pays(x, W):
    """Is `conv3x3` the faster way to convolve x: (B, C, H, W) by W: (C', C, k, k)?

    1.2 times as fast for 128 channels, 1.6 to 2.2 for 256 and more; for fewer, or few pixels, sums cost what it saves.
    """
    return (x.device.type == "cpu" and x.dtype == W.dtype == torch.float32 and W.shape[2:] == (3, 3)
            and min(W.shape[:2]) >= 128 and x.numel() // x.shape[1] >= 2048
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling())


def both_sides(M, x):
    """M x M^T of every patch.  M: (m, n), x: (n, n, ...) -> (m, m, N)"""
    m, n = M.shape
    return M @ (M @ x.reshape(n, -1)).view(m, n, -1)


def conv3x3(x, W, bias):
    """F.conv2d(x, W, bias, padding=1), within 1e-4 of its size.  (B, C, H, W), (C', C, 3, 3) -> (B, C', H, W)"""
    B, C, height, width = x.shape
    K = len(W)
    rows, cols = -(-height // 4), -(-width // 4)            # of patches
    U = both_sides(G, W.permute(2, 3, 0, 1)).view(36, K, C)
    out = x.new_empty(B, K, height, width)
    n = max(1, AT_ONCE // (36 * max(C, K) * B * cols))      # rows of patches at a time
    for first in range(0, rows, n):
        last = min(first + n, rows)
        top, bottom = 4 * first - 1, 4 * last + 1           # of the pixels that these patches see
        strip = x[:, :, max(top, 0) : bottom]
        strip = F.pad(strip, (1, 4 * cols - width + 1, max(-top, 0), max(bottom - height, 0)))
        d = strip.unfold(2, 6, 4).unfold(3, 6, 4).permute(4, 5, 1, 0, 2, 3)             # (6, 6, C, B, n, cols)
        V = both_sides(B_T, d).view(36, C, -1)
        Y = both_sides(A_T, (U @ V).view(6, 6, -1)).view(4, 4, K, B, last - first, cols)
        Y = Y.permute(3, 2, 4, 0, 5, 1).reshape(B, K, -1, 4 * cols)
        target = out[:, :, 4 * first : 4 * last]            # may end within the last patches
        torch.add(Y[:, :, : target.shape[2], :width], bias[:, None, None], out=target)
    return out


def conv2d(x, W, bias, stride, padding):
    """F.conv2d(x, W, bias, stride, padding), the faster way; stride, padding: pairs"""
    if stride == padding == (1, 1) and conv3x3_pays(x, W):
        return conv3x3(x, W, bias)
    return F.conv2d(x, W, bias, stride, padding)
