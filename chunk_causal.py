"""Chunk-causal temporal modelling: the idea that makes DC-AE-V work (paper, section on DC-AE-V; figure on temporal modelling).

A video autoencoder must decide what a frame may see.

* **causal**: only the past. Any length works, but half of the useful context is thrown away.
* **non-causal**: past and future. Best inside the training length, degrades beyond it, needs the whole clip at once.
* **chunk-causal**: time is cut into chunks of c frames. Inside a chunk information flows both ways, across a chunk border only
  forward. Quality of non-causal, length of causal.

All of it happens in one layer, a 3x3x3 convolution. For chunk q with frames x[q*c] .. x[q*c + c-1]:

    y[q*c + j] = bias + W0 * xe(j-1) + W1 * xe(j) + W2 * xe(j+1)
    xe(-1) = last frame of chunk q-1 at this layer's input (zeros for the first chunk)
    xe(c)  = zeros, always: nothing flows back across a border

The state of a stream is explicit. Every layer of the project is called as

    y, state = layer(x, state)

with `state=None` at the start of a stream. A layer made of layers has a tuple of their states. One call over 2c frames, or two
calls over c frames each with the state handed on, give the same result to rounding, so a clip of any length is processed
in the memory of one chunk.

`tests/test_chunk_causal.py` says the same things in code.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

import kernels

TEMPORAL = ("chunk_causal", "causal", "non_causal")


class _Isolated:
    """See ISOLATED."""

    def __repr__(self):
        return "ISOLATED"


#: A state that says: this clip stands alone. Every convolution starts from zeros (and, unless it is causal, ends in zeros), whatever the
#: clip's length, and hands the state on untouched. This is how the released DC-AE-V treats single images and tails shorter than a chunk (spec 3.2, case B).
ISOLATED = _Isolated()


def split_state(state, n):
    """The states of a layer's `n` parts: `None` and ISOLATED hold for all of them, otherwise the state is their tuple."""
    return (state,) * n if state is None or state is ISOLATED else state


def run_layers(layers, x, state=None):
    """Apply streaming layers one after the other -> (y, tuple of their states)."""
    states = []
    for layer, s in zip(layers, split_state(state, len(layers))):
        x, s = layer(x, s)
        states.append(s)
    return x, tuple(states)


class Conv3d(nn.Conv3d):
    """3x3x3 convolution, stride 1, zero padding in space; `temporal` chooses what a frame sees (spec dc-ae-v 3.2).

    Called as `y, state = conv(x, state)` with x of shape [b, c, t, h, w].

    * chunk_causal: t must be a multiple of `chunk`. State: the last input frame, [b, c, 1, h, w].
    * causal: any t. State: the last two input frames.
    * non_causal: any t, no state: every call is a clip of its own.
    """

    def __init__(self, in_channels, out_channels, chunk, temporal="chunk_causal", bias=True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        if temporal not in TEMPORAL:
            raise ValueError(f"temporal is one of {', '.join(TEMPORAL)}, not {temporal!r}.")
        self.chunk, self.temporal = chunk, temporal

    def _conv_forward(self, x, weight, bias):
        # oneDNN (torch 2.13, CPU) computes from uninitialised memory in bf16 with a kernel of three frames: the output of a single frame with few
        # channels, and the weight gradient of exactly two. So short a clip costs nothing, so it gets fp32; every other length was checked.
        if x.shape[2] <= 2 and x.device.type == "cpu" and (torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)
        return kernels.convolution(x, weight, bias, self.padding)

    def forward(self, x, state=None):
        if self.temporal == "causal":
            y, last = self._causal(x, None if state is ISOLATED else state)
            return y, state if state is ISOLATED else last
        if self.temporal == "non_causal" or state is ISOLATED:
            return super().forward(x), state
        return self._chunk_causal(x, state)

    def _causal(self, x, past):
        if past is None:
            past = x.new_zeros(()).expand(x.shape[0], x.shape[1], 2, *x.shape[3:])
        x = torch.cat([past.to(x.dtype), x], dim=2)
        return kernels.convolution(x, self.weight, self.bias, (0, 1, 1)), x[:, :, -2:].clone()

    def _chunk_causal(self, x, past):
        n, rest = divmod(x.shape[2], self.chunk)
        if rest or n == 0:
            raise ValueError(f"a chunk-causal convolution needs a multiple of {self.chunk} frames, got {x.shape[2]}: pad the clip.")
        if kernels.plain():
            return self._by_definition(x, past)
        # The zeros at both ends of a chunk come free with the convolution's own padding. What they leave out is one tap
        # on one frame: W0 on the frame before each chunk. Adding that afterwards avoids copying the whole activation.
        y = super().forward(x if n == 1 else rearrange(x, "b c (n t) h w -> (b n) c t h w", n=n))
        last = x[:, :, self.chunk - 1 :: self.chunk]  # b c n h w: the last frame of every chunk
        before, first = (last[:, :, :-1], 1) if past is None else (torch.cat([past.to(x.dtype), last[:, :, :-1]], 2), 0)
        if before.shape[2]:
            left = kernels.convolution(rearrange(before, "b c n h w -> (b n) c h w"), self.weight[:, :, 0], None, (1, 1))
            y = rearrange(y, "(b n) c t h w -> b n c t h w", n=n)
            y[:, first:, :, 0] += rearrange(left, "(b n) c h w -> b n c h w", b=x.shape[0])
            y = rearrange(y, "b n c t h w -> b c (n t) h w")
        elif n > 1:
            y = rearrange(y, "(b n) c t h w -> b c (n t) h w", n=n)
        return y, last[:, :, -1:].clone()

    def _by_definition(self, x, past):
        """The plain twin: every chunk X becomes [L | X | 0], L the frame before it, and goes through a convolution without padding in time."""
        out, left = [], torch.zeros_like(x[:, :, :1]) if past is None else past.to(x.dtype)
        for chunk in x.split(self.chunk, dim=2):
            padded = torch.cat([left, chunk, torch.zeros_like(chunk[:, :, :1])], dim=2)
            out.append(F.conv3d(padded, self.weight, self.bias, padding=(0, 1, 1)))
            left = chunk[:, :, -1:]
        return torch.cat(out, dim=2), left.clone()


def pixel_unshuffle(x, r, t=1):
    """Space-time to depth: [b, c, T*t, H*r, W*r] -> [b, c*t*r*r, T, H, W]; channel slowest, then dt, dh, dw (spec 3.3). Keeps the memory format."""
    if kernels.layout(x) == torch.channels_last_3d:
        return rearrange(x, "b c (T t) (h p) (w q) -> b T h w (c t p q)", t=t, p=r, q=r).permute(0, 4, 1, 2, 3)
    return rearrange(x, "b c (T t) (h p) (w q) -> b (c t p q) T h w", t=t, p=r, q=r)


def pixel_shuffle(x, r, t=1):
    """Depth to space-time, the exact inverse: [b, c*t*r*r, T, H, W] -> [b, c, T*t, H*r, W*r] (spec 3.3)."""
    if kernels.layout(x) == torch.channels_last_3d:
        return rearrange(x, "b (c t p q) T h w -> b (T t) (h p) (w q) c", t=t, p=r, q=r).permute(0, 4, 1, 2, 3)
    return rearrange(x, "b (c t p q) T h w -> b c (T t) (h p) (w q)", t=t, p=r, q=r)


def pixel_shuffle_add(y, x, r, t=1):
    """pixel_shuffle(y) + pixel_shuffle(x, each channel repeated until it has as many as y): an upsampling and its shortcut (spec 3.4).

    The same numbers are added before both are shuffled, so that neither the repeated copy nor a second shuffle is made.
    """
    n = y.shape[1] // x.shape[1]
    if kernels.plain():
        return pixel_shuffle(y, r, t) + pixel_shuffle(repeat(x, "b c T h w -> b (c n) T h w", n=n), r, t)
    return pixel_shuffle((y.unflatten(1, (-1, n)) + x.unsqueeze(2)).flatten(1, 2), r, t)
