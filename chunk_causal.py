"""Chunk-causal temporal modelling: the idea that makes DC-AE-V work (paper, section on
DC-AE-V).

A video autoencoder must decide what a frame may see.

* **causal**: only the past. Any length works, but half of the useful context is lost.
* **non-causal**: past and future. Best inside the training length, degrades beyond it,
  needs the whole clip at once.
* **chunk-causal**: time is cut into chunks of c frames. Inside a chunk information
  flows both ways, across a border only forward: the quality of one, the length of the
  other.

All of it happens in one layer, a 3x3x3 convolution. Chunk q has frames x[q*c] ..
x[q*c+c-1]:

    y[q*c + j] = bias + W0 . xe(j-1) + W1 . xe(j) + W2 . xe(j+1)    . is a 3x3 convolution
    xe(j)  = x[q*c + j] inside the chunk, 0 <= j < c
    xe(-1) = last frame of chunk q-1 at this layer's input (zeros for the first chunk)
    xe(c)  = zeros, always: nothing flows back across a border

The state of a stream is explicit: every layer is called as `y, state = layer(x,
state)`, with None at the start of a stream. One call over 2c frames, or two calls over
c frames each with the state handed on, give the same result to rounding, so a clip of
any length is processed in the memory of one chunk. `tests/test_chunk_causal.py` says
the same in code.
"""
import torch
import torch.nn as nn
from einops import rearrange, repeat

import kernels
from files.checkpoint import UserError

TEMPORAL = ("chunk_causal", "causal", "non_causal")


class Conv3d(nn.Conv3d):
    """3x3x3 convolution, stride 1, zero padding in space; `temporal` chooses what a
    frame sees.

    Called as `y, state = conv(x, state)` with x of shape [b, c, t, h, w].

    * chunk_causal: t must be a multiple of `chunk`. State: the last input frame.
    * causal: any t. State: the last two input frames.
    * non_causal: any t, no state: every call is a clip of its own.

    In all three, the state ISOLATED (below) makes a call a clip of its own.
    """

    def __init__(self, in_channels, out_channels, chunk, temporal="chunk_causal", bias=True,
                 groups=1):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, groups=groups)
        if temporal not in TEMPORAL:
            raise ValueError(f"temporal is one of {', '.join(TEMPORAL)}, not {temporal!r}.")
        self.chunk, self.temporal = chunk, temporal

    def forward(self, x, state=None):
        alone = state is ISOLATED
        if self.temporal == "chunk_causal" and not alone:
            return self._chunk_causal(x, state)
        if self.temporal == "causal":
            y, last = self._causal(x, None if alone else state)
            return y, state if alone else last
        return kernels.convolution(x, self.weight, self.bias, (1, 1, 1)), state

    def _chunk_causal(self, x, past):
        n, rest = divmod(x.shape[2], self.chunk)
        if rest or n == 0:
            raise ValueError(f"a chunk-causal convolution needs a multiple of {self.chunk} "
                             f"frames, got {x.shape[2]}: pad the clip.")
        last = x[:, :, self.chunk - 1 :: self.chunk]  # b c n h w: the last frame of every chunk
        before = torch.zeros_like(last[:, :, :1]) if past is None else past.to(x.dtype)
        if n > 1:
            before = torch.cat([before, last[:, :, :-1]], dim=2)
        before = rearrange(before, "b c n h w -> (b n) c h w")
        chunks = rearrange(x, "b c (n t) h w -> (b n) c t h w", n=n)
        if kernels.plain() or self.groups > 1:
            # The definition: every chunk X becomes [L | X | 0], L the frame before it. (And
            # the faster form of a depthwise convolution, which costs little more than a copy.)
            before = before.unsqueeze(2)
            padded = torch.cat([before, chunks, torch.zeros_like(before)], dim=2)
            y = kernels.convolution(padded, self.weight, self.bias, (0, 1, 1))
        else:
            # The zeros at both ends of a chunk come free with the convolution's own
            # padding. What they leave out is one tap on one frame: W0 on L. Adding that
            # afterwards avoids copying the whole activation.
            y = kernels.convolution(chunks, self.weight, self.bias, (1, 1, 1))
            if n > 1 or past is not None:
                y[:, :, 0] += kernels.convolution(before, self.weight[:, :, 0], None, (1, 1))
        return rearrange(y, "(b n) c t h w -> b c (n t) h w", n=n), last[:, :, -1:].clone()

    def _causal(self, x, past):
        if past is None:
            past = x.new_zeros(()).expand(x.shape[0], x.shape[1], 2, *x.shape[3:])
        x = torch.cat([past.to(x.dtype), x], dim=2)
        y = kernels.convolution(x, self.weight, self.bias, (0, 1, 1))
        return y, x[:, :, -2:].clone()


def run_layers(layers, x, state=None):
    """Apply streaming layers one after the other -> (y, list of their states).

    The list that comes in is used up: each state is replaced when its layer has run, so
    that old and new do not pile up (at 4K the state of a layer is a GB).
    """
    states = split_state(state, len(layers))
    for i, layer in enumerate(layers):
        x, states[i] = layer(x, states[i])
    return x, states


def split_state(state, n):
    """The states of a layer's `n` parts. None and ISOLATED hold for all of them."""
    return [state] * n if state is None or state is ISOLATED else state


#: A state that says: this clip stands alone. Every convolution starts from zeros (and,
#: unless it is causal, ends in zeros), whatever the clip's length, and hands the state
#: on untouched. The released DC-AE-V treats single images so: repeated for the frames
#: of one latent frame.
ISOLATED = "isolated"


# ------------------------------------------------------------------ space-time to depth


def pixel_unshuffle(x, r, t=1):
    """Space-time to depth: [b, c, T*t, H*r, W*r] -> [b, (c t r r), T, H, W]."""
    pattern = "b c (T t) (h p) (w q) -> b (c t p q) T h w"
    return kernels.rearrange(x, pattern, t=t, p=r, q=r)


def pixel_shuffle(x, r, t=1):
    """The inverse: [b, (c t r r), T, H, W] -> [b, c, T*t, H*r, W*r]."""
    pattern = "b (c t p q) T h w -> b c (T t) (h p) (w q)"
    if x.shape[1] == 3 * t * r * r:  # colours: written one by one they take a third of the time
        return rearrange(x, pattern, t=t, p=r, q=r)
    return kernels.rearrange(x, pattern, t=t, p=r, q=r)


def pixel_shuffle_add(y, x, r, t=1):
    """An upsampling and its shortcut: pixel_shuffle(y) + pixel_shuffle(x, every channel
    repeated until it has as many as y).

    The same numbers are added before both are shuffled, so that neither the repeated
    copy nor a second shuffle is made.
    """
    n = y.shape[1] // x.shape[1]
    if kernels.plain():
        repeated = repeat(x, "b c T h w -> b (c n) T h w", n=n)
        return pixel_shuffle(y, r, t) + pixel_shuffle(repeated, r, t)
    return pixel_shuffle((y.unflatten(1, (-1, n)) + x.unsqueeze(2)).flatten(1, 2), r, t)


# ------------------------------------------------------------------------------ streams


def recut(pieces, channels, size, first=None):
    """Pieces of a video [b, channels, t, h, w], cut anywhere -> one of `first` frames
    (default: `size`), then of `size`. The last may be shorter."""
    held, missing = [], first or size
    for piece in pieces:
        if piece.ndim != 5 or piece.shape[1] != channels or 0 in piece.shape:
            raise UserError(f"the layout is [batch, {channels}, frames, height, width], "
                            f"got the shape {list(piece.shape)}.")
        while piece.shape[2]:
            part, piece = piece[:, :, :missing], piece[:, :, missing:]
            held.append(part)
            missing -= part.shape[2]
            if missing == 0:
                yield torch.cat(held, dim=2)
                held, missing = [], size
    if held:
        yield torch.cat(held, dim=2)
