"""DC-AE-V: the deep compression video autoencoder (paper, section on DC-AE-V).

A deterministic, purely convolutional autoencoder: no attention, no KL term, no
quantisation. A video [b, 3, T, H, W] in [-1, 1] becomes a latent [b, Z, T/4, H/32,
W/32] (H/64 for f64). `fXtYcZ` names spatial factor, temporal factor and latent
channels.

    encoder:  conv + unshuffle(2) | stage | down(2) | ... | down(t=4) | stage | conv
    decoder:  conv | stage | up(t=4) | ... | up(2) | stage | norm, SiLU, conv + shuffle

A stage is a row of residual blocks  y = x + RMSNorm(conv(SiLU(conv(x)))). Down and up
blocks have parameter-free shortcuts (channel averaging and duplicating, from the image
DC-AE): they rearrange space into channels, and the convolution only learns what that
misses. The temporal resampling is the innermost one. Every convolution is chunk-causal
(`chunk_causal.py`): one pass over a clip, or chunk after chunk with the state handed
on, give the same latent.

    python ae.py reconstruct assets/bunny.mp4       a film through it: mp4, PSNR, SSIM
    python ae.py reconstruct CLIP --weights FILE    the same through official weights
    python ae.py train --data CLIPS --preset small  trains one on a folder of film
    python ae.py distill --weights FILE --data CLIPS --preset f32t4c32-light
                                                    a light decoder of its latent
    python ae.py eval FILE ... --data CLIPS         PSNR, SSIM, LPIPS, FVD, flicker
    python ae.py compare                            chunk-causal against the others
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import dataclasses
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import reduce

import kernels
from chunk_causal import (
    Conv3d, pixel_shuffle, pixel_shuffle_add, pixel_unshuffle, recut, run_layers, split_state)
from files import checkpoint, layouts, options
from files.checkpoint import UserError


@dataclass(frozen=True)
class Config:
    """Size of a DC-AE-V. One width and depth per stage; depth 0: no such stage."""

    widths: tuple
    depths: tuple
    latent_channels: int
    chunk: int = 40  # frames per chunk at pixel rate; 1: a frame sees itself and the past
    scale: float = 1.0  # the diffusion model sees scale * encode(x), about unit RMS
    patch: int = 2  # spatial factor of the outermost unshuffle and shuffle
    temporal_factor: int = 4
    temporal: str = "chunk_causal"  # or "causal", "non_causal": the paper's alternatives
    # the decoder, where it is not the encoder's mirror; the innermost stages where these
    # are fewer: the others are left to a larger shuffle at the end
    decoder_widths: tuple = ()
    decoder_depths: tuple = ()
    separable: int = 0  # its innermost stages with depthwise and pointwise convolutions

    def __post_init__(self):
        for name in ("widths", "depths", "decoder_widths", "decoder_depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.chunk != 1 and (self.chunk < 1 or self.chunk % self.temporal_factor):
            raise ValueError(f"chunk ({self.chunk}) must be 1 or a multiple of temporal_factor "
                             f"({self.temporal_factor}).")

    @property
    def first(self):
        """Index of the first stage that exists."""
        return next(i for i, d in enumerate(self.depths) if d > 0)

    @property
    def spatial_factor(self):
        return self.patch * 2 ** (len(self.widths) - 2 - self.first)

    @property
    def lead(self):
        """Frames of the first latent frame: as of any other; one in the Wan VAE."""
        return self.temporal_factor

    @property
    def latent_chunk(self):
        """Latent frames per chunk."""
        return max(1, self.chunk // self.temporal_factor)

    @property
    def piece(self):
        """Frames of a call: a chunk, or one latent frame's where chunks are shorter."""
        return self.latent_chunk * self.temporal_factor

    @property
    def mirror(self):
        """This Config as the decoder sees it: its own widths and depths, and the patch
        that is left for its last shuffle."""
        n, f = len(self.widths), self.spatial_factor
        widths, depths = self.decoder_widths or self.widths, self.decoder_depths or self.depths
        widths, depths = ((0,) * (n - len(own)) + own for own in (widths, depths))
        c = dataclasses.replace(self, widths=widths, depths=depths, patch=1)
        return dataclasses.replace(c, patch=f // c.spatial_factor)

    def resample(self, i):
        """(spatial, temporal) factor between stages i, i+1: time for the innermost."""
        return (1, self.temporal_factor) if i == len(self.widths) - 2 else (2, 1)


_F32 = dict(widths=(128, 256, 512, 512, 1024, 1024, 1024), depths=(0, 5, 10, 4, 4, 4, 4))
_F64 = dict(widths=(*_F32["widths"], 1024), depths=(*_F32["depths"], 4))

PRESETS = {
    "f32t4c32": Config(**_F32, latent_channels=32, scale=0.7241),
    "f32t4c64": Config(**_F32, latent_channels=64, scale=0.7614),
    "f32t4c128": Config(**_F32, latent_channels=128, scale=0.4457),
    "f32t4c256": Config(**_F32, latent_channels=256, scale=0.4752),
    "f64t4c128": Config(**_F64, latent_channels=128, scale=0.4752),
    # For the toy world of toy.py: the deep autoencoder, and the moderate one of its
    # base model.
    "toy": Config((0, 16, 32, 64, 64, 64), (0, 1, 1, 2, 2, 1), 32, chunk=8,
                  decoder_widths=(32, 64, 64, 64, 64)),
    "toy-base": Config((0, 16, 32, 64, 64), (0, 1, 1, 2, 1), 16, chunk=8,
                       decoder_widths=(32, 64, 64, 64)),
    # For film on a laptop, f32t4c32: full-resolution layers cost everything, so patches
    # of 4.
    "small": Config((0, 48, 64, 64, 128, 128), (0, 1, 1, 1, 1, 1), 32, chunk=8, patch=4),
    # For film, small enough to be embedded: 128 channels, 96 times fewer numbers.
    "film": Config((0, 48, 64, 64, 128, 128), (0, 1, 1, 1, 0, 0), 128, chunk=8, patch=4,
                   decoder_widths=(64, 64, 128, 128, 128), decoder_depths=(1, 1, 2, 2, 1),
                   separable=3),
    # What "small" is measured by: f8t4c16 of about as many operations, causal as the
    # Wan VAE.
    "small-base": Config((0, 48, 64, 64), (0, 1, 1, 6), 16, 8, patch=4, temporal="causal"),
}


# ------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """Normalise over channels at each (b, t, h, w), then scale and shift."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, silu=False, shortcut=None):
        return kernels.rms_norm_channels(x, self.weight, self.bias, 1e-5, silu, shortcut)


class Separable(nn.Module):
    """A 3x3x3 convolution in two: one channel at a time, then one position at a time.
    27 + cout multiplications for each number in place of 27 cout."""

    def __init__(self, conv):
        super().__init__()
        cin, cout, bias = conv.in_channels, conv.out_channels, conv.bias is not None
        self.depthwise = Conv3d(cin, cin, conv.chunk, conv.temporal, bias=False, groups=cin)
        self.pointwise = nn.Conv3d(cin, cout, 1, bias=bias)

    def forward(self, x, state=None):
        x, state = self.depthwise(x, state)
        weight, bias = self.pointwise.weight, self.pointwise.bias
        return kernels.convolution(x, weight, bias, (0, 0, 0)), state


class ConvLayer(nn.Module):
    """Convolution, optionally RMSNorm, optionally SiLU; a `shortcut` is added last."""

    def __init__(self, cin, cout, chunk, temporal, bias=True, norm=False, act=False):
        super().__init__()
        self.conv = Conv3d(cin, cout, chunk, temporal, bias=bias)
        self.norm = RMSNorm(cout) if norm else None
        self.act = act

    def forward(self, x, state=None, shortcut=None):
        x, state = self.conv(x, state)
        if self.norm is not None:
            return self.norm(x, self.act, shortcut), state
        x = F.silu(x, inplace=not x.requires_grad) if self.act else x
        return x if shortcut is None else x + shortcut, state


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv(x)))), the second convolution without bias."""

    def __init__(self, width, chunk, temporal):
        super().__init__()
        self.main = nn.ModuleDict({
            "conv1": ConvLayer(width, width, chunk, temporal, act=True),
            "conv2": ConvLayer(width, width, chunk, temporal, bias=False, norm=True)})

    def forward(self, x, state=None):
        state1, state2 = split_state(state, 2)
        y, state1 = self.main.conv1(x, state1)
        y, state2 = self.main.conv2(y, state2, shortcut=x)
        return y, (state1, state2)


class Resample(nn.Module):
    """Convolution, then space-time to depth (down) or depth to space-time (`up`).

    Down: [b, cin, T, H, W] -> [b, cout, T/t, H/r, W/r]. Up: -> [b, cout, T*t, H*r,
    W*r].
    """

    def __init__(self, cin, cout, r, t, chunk, temporal, up=False):
        super().__init__()
        self.r, self.t, self.shuffle = r, t, pixel_shuffle if up else pixel_unshuffle
        self.zoom = r if up else 1 / r  # of the sides, for gpu/tiling.py
        between = cout * t * r * r if up else cout // (t * r * r)
        self.conv = ConvLayer(cin, between, chunk, temporal)

    def forward(self, x, state=None):
        x, state = self.conv(x, state)
        return self.shuffle(x, self.r, self.t), state


def averaging_shortcut(x, cout, r, t):
    """Unshuffle, then average consecutive groups of channels down to `cout`."""
    return reduce(pixel_unshuffle(x, r, t), "b (o g) t h w -> b o t h w", "mean", o=cout)


class DownBlock(nn.Module):
    """Resampling down plus the averaging shortcut."""

    def __init__(self, cin, cout, r, t, chunk, temporal):
        super().__init__()
        self.main, self.cout = Resample(cin, cout, r, t, chunk, temporal), cout

    def forward(self, x, state=None):
        y, state = self.main(x, state)
        return y + averaging_shortcut(x, self.cout, self.main.r, self.main.t), state


class UpBlock(nn.Module):
    """Resampling up plus the duplicating shortcut: repeated channels, shuffled."""

    def __init__(self, cin, cout, r, t, chunk, temporal):
        super().__init__()
        self.main = Resample(cin, cout, r, t, chunk, temporal, up=True)

    def forward(self, x, state=None):
        y, state = self.main.conv(x, state)
        return pixel_shuffle_add(y, x, self.main.r, self.main.t), state


def stage(blocks):
    """A row of blocks at one resolution, named as in the official checkpoints."""
    return nn.ModuleDict({"op_list": nn.ModuleList(blocks)})


class Encoder(nn.Module):
    """[b, 3, T, H, W] -> [b, Z, T/4, H/f, W/f] and the states of its layers. Official names
    of parameters."""

    def __init__(self, c):
        super().__init__()
        n, widths = len(c.widths), c.widths
        self.project_in = Resample(3, widths[c.first], c.patch, 1, c.chunk, c.temporal)
        self.stages = nn.ModuleList()
        for i in range(n):
            chunk = c.latent_chunk if i == n - 1 else c.chunk
            blocks = [ResBlock(widths[i], chunk, c.temporal) for _ in range(c.depths[i])]
            if c.first <= i < n - 1:
                ends = widths[i], widths[i + 1]
                blocks.append(DownBlock(*ends, *c.resample(i), chunk, c.temporal))
            self.stages.append(stage(blocks))
        self.project_out = ConvLayer(widths[-1], c.latent_channels, c.latent_chunk, c.temporal)

    @property
    def layers(self):
        """All blocks in order."""
        blocks = [block for stage in self.stages for block in stage.op_list]
        return self.project_in, *blocks, self.project_out

    def forward(self, x, state=None):
        return run_layers(self.layers, x, state)


class Head(nn.Module):
    """RMSNorm, SiLU, conv and shuffle to pixels; in the checkpoints a list of three."""

    def __init__(self, width, c):
        super().__init__()
        up = Resample(width, 3, c.patch, 1, c.chunk, c.temporal, up=True)
        self.op_list = nn.ModuleList([RMSNorm(width), nn.SiLU(), up])

    def forward(self, x, state=None):
        norm, _, up = self.op_list
        return up(norm(x, silu=True), state)


class Decoder(nn.Module):
    """[b, Z, T/4, H/f, W/f] -> [b, 3, T, H, W] and the states of its layers. The last stage
    runs first."""

    def __init__(self, c):
        super().__init__()
        c = c.mirror
        n, widths = len(c.widths), c.widths
        self.project_in = ConvLayer(c.latent_channels, widths[-1], c.latent_chunk, c.temporal)
        self.stages = nn.ModuleList()
        for i in range(n):
            chunk = c.latent_chunk if i == n - 1 else c.chunk
            blocks = [ResBlock(widths[i], chunk, c.temporal) for _ in range(c.depths[i])]
            if c.first <= i < n - 1:  # the temporal up block still convolves at the latent rate
                up_chunk = c.latent_chunk if i == n - 2 else c.chunk
                ends = widths[i + 1], widths[i]
                blocks.insert(0, UpBlock(*ends, *c.resample(i), up_chunk, c.temporal))
            self.stages.append(stage(blocks))
        self.project_out = Head(widths[c.first], c)
        light = [*self.stages[n - c.separable :]]
        if c.separable >= n - c.first:
            light.append(self.project_out)
        for layer in nn.ModuleList(light).modules():
            if isinstance(layer, ConvLayer):
                layer.conv = Separable(layer.conv)

    @property
    def layers(self):
        """All blocks in order."""
        blocks = [block for stage in reversed(self.stages) for block in stage.op_list]
        return self.project_in, *blocks, self.project_out

    def forward(self, z, state=None):
        return run_layers(self.layers, z, state)


# ---------------------------------------------------------------------- the autoencoder


class VideoAutoencoder(nn.Module):
    """Pixels [b, 3, T, H, W] in [-1, 1] <-> latents, of any length and size.

    `encoder` and `decoder` take whole chunks of whole cells. A clip is padded to that
    by repeating its last frame, row and column, and what comes back is cropped. Chunk
    after chunk goes through, so memory does not grow with length. (wan/vae.py is
    another one of these.)
    """

    at_once = 0  # pixels below which the decoder takes several chunks: fixed costs rule there

    def encode(self, x):
        """[b, 3, T, H, W] -> latent [b, Z, *latent_shape(T, H, W)]."""
        return torch.cat(list(self.encode_stream([x])), dim=2)

    def decode(self, z, frames=None, size=None):
        """Latent -> [b, 3, frames, *size], not clamped; by default all it holds."""
        pieces = list(self.decode_stream(z))
        x = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
        h, w = size or x.shape[3:]
        return x[:, :, :frames, :h, :w]

    def forward(self, x):
        """Reconstruction of a clip: encode, decode, crop."""
        return self.decode(self.encode(x), x.shape[2], x.shape[3:])

    def encode_stream(self, clips):
        """Clips of one video in order, cut anywhere -> its latents, chunk by chunk."""
        state = None
        for x in self.pixel_chunks(clips):
            features, state = self.encoder(x, state)
            yield self.to_latent(features)

    def decode_stream(self, z):
        """Latents (a tensor, or pieces cut anywhere) -> frames, chunk by chunk."""
        state = None
        for features, surplus in self.latent_chunks(z):
            x, state = self.decoder(features, state)
            yield x[:, :, : x.shape[2] - surplus]

    def pixel_chunks(self, clips):
        """Clips, cut anywhere -> what the encoder takes, call by call."""
        c, dtype = self.config, next(self.parameters()).dtype
        first = c.lead + c.piece - c.temporal_factor
        for i, x in enumerate(recut(clips, 3, c.piece, first)):
            t = (c.piece if i else first) - x.shape[2]
            h, w = (-n % c.spatial_factor for n in x.shape[3:])
            x = F.pad(x, (0, w, 0, h, 0, t), mode="replicate") if t or h or w else x
            yield x.to(dtype)

    def latent_chunks(self, z):
        """Latents, cut anywhere -> (what the decoder takes, surplus frames)."""
        c, together = self.config, 1
        if isinstance(z, torch.Tensor):
            z, together = [z], self.chunks_at_once(*z.shape[3:])
        for piece in recut(z, c.latent_channels, c.latent_chunk * together):
            missing = -piece.shape[2] % c.latent_chunk
            piece = F.pad(piece, (0, 0, 0, 0, 0, missing), mode="replicate")
            yield self.from_latent(piece), missing * c.temporal_factor

    def latent_shape(self, frames, height, width):
        """(t, h, w) of the latent of a clip: whole chunks, whole cells."""
        c = self.config
        chunks = math.ceil((frames - c.lead + c.temporal_factor) / c.piece)
        cells = (math.ceil(n / c.spatial_factor) for n in (height, width))
        return chunks * c.latent_chunk, *cells

    def to_latent(self, features):
        """What the encoder gives -> latent."""
        return features

    def from_latent(self, z):
        """Latent -> what the decoder takes."""
        return z

    def chunks_at_once(self, height, width):
        """Chunks of a latent of so many cells that one call of the decoder takes."""
        c = self.config
        return max(1, self.at_once // (c.piece * height * width * c.spatial_factor**2))


class DCAEV(VideoAutoencoder):
    """DC-AE-V. The diffusion model sees `config.scale` times what `encode` gives."""

    path = None  # of the file that it was loaded from

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.at_once = 2**22 if config.separable else 2**17  # 2**17: 32 frames of 64x64
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def load_official(self, sd):
        """Copy an official state dict, bare or in its container -> self, in eval."""
        return checkpoint.load_strict(self, checkpoint.unwrap(sd), "the autoencoder weights").eval()


# ------------------------------------------------------------------------- weight files


def infer_config(tensors, name=""):
    """Config from the shapes of official weights. UserError if no preset is like them.

    What shapes do not show (chunk, scale) is that of the preset with as many stages and
    latent channels; if several have, of the one with these widths and depths, else of
    the first.
    """
    shape = Config(*layouts.autoencoder_sizes(tensors))
    alike = []
    for c in PRESETS.values() if any(shape.depths) else ():
        same_stages = len(c.depths) == len(shape.depths) and c.first == shape.first
        if same_stages and c.latent_channels == shape.latent_channels:
            alike.append(c)
    if not alike:
        raise UserError(f"{name or 'this file'} holds no DC-AE-V of a known preset "
                        f"({', '.join(PRESETS)}): give another file, or in Python its Config.")
    for c in alike:
        if c.depths == shape.depths and c.widths[c.first :] == shape.widths[c.first :]:
            return c
    return dataclasses.replace(alike[0], widths=shape.widths, depths=shape.depths)


def stored_config(metadata):
    """The Config in the header of our own files; None where there is none."""
    own, names = metadata.get("config"), {f.name for f in dataclasses.fields(Config)}
    ours = isinstance(own, dict) and {"widths", "depths"} <= own.keys() <= names
    return Config(**own) if ours else None


def load(path, config=None):
    """Weights of a DC-AE-V -> DCAEV in eval mode, fp32 (bf16 files are widened).

    `path`: an official container (bare state dict, `model_state_dict`,
    `ema_model_state_dict`), whose preset is inferred from the shapes, or our own
    .safetensors, which carries its config.
    """
    tensors, metadata = checkpoint.load_tensors(path)
    if tensors and all(name.startswith("decoder.") for name in tensors):
        raise UserError(f"{path} holds a decoder alone: give its whole autoencoder's file, and "
                        "this one with --decoder.")
    stored = stored_config(metadata)
    if config and stored:  # the scale belongs to the weights
        config = dataclasses.replace(config, scale=stored.scale)
    config = config or stored or infer_config(tensors, path)
    with torch.device("meta"):
        net = DCAEV(config)
    net = checkpoint.load_strict(net, tensors, str(path), "cpu").eval()
    net.path = path
    return net.to(memory_format=torch.channels_last_3d)  # as convolutions want it (kernels.py)


def save(net, path, dtype=torch.float32, part="", **metadata):
    """Write weights and config as safetensors, atomically; official key names. part: of
    the names of what is written, "decoder." for a decoder alone."""
    state = net.state_dict().items()
    tensors = {name: value.to(dtype) for name, value in state if name.startswith(part)}
    checkpoint.save_tensors(path, tensors, {"config": dataclasses.asdict(net.config), **metadata})


# ------------------------------------------------------------------------- command line


def main(argv=None):
    """Each command lives in a later room (training/, experiments/), imported only when asked
    for."""
    argv = sys.argv[1:] if argv is None else argv
    p = options.Parser(
        description="DC-AE-V, the deep compression video autoencoder.",
        usage="ae.py COMMAND ... (COMMAND --help says more)")
    p.add_argument(
        "command", choices=("reconstruct", "train", "distill", "eval", "compare"),
        help="reconstruct: a video file through it; train: on the toy world or a folder of "
        "clips; distill: a light decoder; eval: a table of PSNR, SSIM, ...; compare: chunk-causal "
        "against the others")
    command = p.parse_args(argv[:1]).command
    if command == "reconstruct":
        from training.evaluate import main_reconstruct as run
    elif command == "train":
        from training.autoencoder import main_train as run
    elif command == "distill":
        from training.distill import main_distill as run
    elif command == "eval":
        from training.evaluate import main_eval as run
    else:
        from experiments.temporal import main_compare as run
    run(argv[1:])


if __name__ == "__main__":
    with errors.user_errors():
        main()
