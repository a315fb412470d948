"""What an autoencoder does to video, and what that costs: a film side by side with its reconstruction, the table of the published evaluation
(spec dc-ae-v 8) for any autoencoder, and the memory of a stream that does not end.

    python ae.py reconstruct assets/bunny.mp4                              side-by-side mp4, contact sheet, PSNR, SSIM
    python ae.py eval A.safetensors Wan2.1_VAE.pth --data CLIPS            a line for each: DC-AE-V and Wan VAE files, in one table; with --results also pictures
    python ae.py eval weights/toy.safetensors --stream 2000                2,000 frames in the memory of one chunk -> results/streaming.json
"""
import argparse
import itertools
import time
from pathlib import Path

import torch
from tqdm import tqdm

import ae
from files import ROOT, checkpoint, video
from files.checkpoint import UserError
from gpu import choose
from training import clips, metrics
from wan import vae


def load(path):
    """Weights of a DC-AE-V or of a Wan VAE (a file, or a diffusers folder) -> that autoencoder, in eval mode."""
    try:
        return ae.load(path)
    except UserError as no_dc_ae_v:
        try:
            return vae.load(path)
        except UserError:
            raise no_dc_ae_v from None


# ---------------------------------------------------------------------------------------------------- one film


@torch.no_grad()
def reconstruct(net, clip, out, frames=None, size=None, compat=False):
    """A video file through the autoencoder, chunk by chunk, so that length costs no memory -> dict of the results.

    Writes OUT/<clip>_reconstruction.mp4 (original | reconstruction), .png (evenly spaced frames of both), .json (the results; PSNR
    and SSIM as in spec 8.2).
    """
    c, like, info = net.config, next(net.parameters()), video.clip_info(clip)
    psnr, ssim, shown, latent, seconds = [], [], [], [], dict(encode=0.0, decode=0.0)
    step = max(1, (frames or int(info.seconds * info.fps) or 8 * c.piece) // 8)  # between the frames of the contact sheet

    def now():
        if like.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def side_by_side():
        encoder_state = decoder_state = None
        bar = tqdm(total=frames or int(info.seconds * info.fps) or None, desc="reconstruct", unit="frame", leave=False)
        for x in video.iter_clip(clip, frames, size, piece=c.piece):
            x, start = x[None], now()
            z, encoder_state = net.encode_chunk(x.to(like), encoder_state, compat)
            middle = now()
            y, decoder_state = net.decode_chunk(z, decoder_state, compat)
            seconds["encode"] += middle - start
            seconds["decode"] += now() - middle
            y = y[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].to(x)
            if -len(psnr) % step < x.shape[2]:
                shown.append(torch.cat([x, y])[:, :, -len(psnr) % step :: step].clone())
            psnr.extend(metrics.psnr_frames(y, x)[0].tolist())
            ssim.extend(metrics.ssim_frames(y, x)[0].tolist())
            latent.append(z.shape[2])
            bar.update(x.shape[2])
            yield torch.cat([x, y], dim=4)[0]
        bar.close()

    h, w = size or (info.height, info.width)
    path = f"{Path(out) / Path(clip).stem}_reconstruction"
    video.write_video(f"{path}.mp4", side_by_side(), info.fps, scale=max(1, 256 // h))
    video.contact_sheet(f"{path}.png", torch.cat(shown, dim=2), labels=["original", "reconstruction"], scale=min(2, 200 / h))
    result = dict(
        clip=str(clip), written=path, frames=len(psnr), height=h, width=w, fps=info.fps,
        psnr=round(metrics.finite_mean(torch.tensor(psnr)), 3), ssim=round(sum(ssim) / len(ssim), 4),
        latent=[c.latent_channels, sum(latent), *net.latent_shape(1, h, w)[1:]],
        compression=3 * c.spatial_factor**2 * c.temporal_factor / c.latent_channels, chunk=c.chunk, compat=compat,
        seconds={k: round(v, 3) for k, v in seconds.items()},
        dtype=str(like.dtype), device=str(like.device), threads=torch.get_num_threads(), torch=torch.__version__)
    checkpoint.write_json(f"{path}.json", result)
    return result


# ---------------------------------------------------------------------------------------------------- many films: the table


def evaluate(net, held_out):
    """`metrics.evaluate` for an autoencoder of either kind, and the statistics of its raw latents. held_out: list of (name, x [3, t, h, w])."""
    c, like, latents = net.config, next(net.parameters()), []

    def reconstruct(x):
        z = net.encode(x.to(like))
        latents.append(z.float().cpu())
        return net.decode(z, x.shape[2], x.shape[3:])

    borders = {"latent frame": (c.temporal_factor, c.lead % c.temporal_factor)}
    if hasattr(c, "chunk"):
        borders["chunk"] = (c.chunk, 0)
    result = metrics.evaluate(reconstruct, held_out, borders, c.spatial_factor)
    return dict(**result, latent=metrics.latent_statistics(latents[: len(held_out)]))


@torch.no_grad()
def show(path, nets, held_out, frames=4):
    """A contact sheet: clip by clip, the original and what each of {name: autoencoder} makes of it."""
    rows, labels = [], []
    for _, x in held_out:
        rows, labels = rows + [x.cpu()], labels + ["original"]
        for name, net in nets.items():
            like = next(net.parameters())
            rows.append(net.decode(net.encode(x[None].to(like)), x.shape[1], x.shape[2:])[0].float().cpu())
            labels.append(name)
    video.contact_sheet(path, rows, frames, labels, scale=max(1, 192 // rows[0].shape[2]))


# ---------------------------------------------------------------------------------------------------- a film without end


def resident():
    """Bytes of this process in main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
def stream(net, clip, frames, size, check=80):
    """Encode and decode `frames` frames of `clip`, played over and over, as one stream -> dict with the memory over frame index.

    Nothing is kept but the state. The first `check` frames are also done in one call over all of them: `error` is the largest difference.
    """
    c = net.config
    film = itertools.chain.from_iterable(video.iter_clip(clip, None, size, piece=c.piece) for _ in itertools.count())
    first, seen, rows, started = [], 0, [], time.perf_counter()

    def source():
        sent = 0
        while sent < frames:
            piece = next(film)[None, :, : frames - sent]
            sent += piece.shape[2]
            if sum(x.shape[2] for x in first) < check:
                first.append(piece)
            yield piece

    kept = []
    for y in tqdm(net.decode_stream(net.encode_stream(source())), "stream", -(-frames // c.piece), unit="chunk", mininterval=5):
        seen += y.shape[2]
        if seen <= check:
            kept.append(y)
        rows.append((min(seen, frames), round(resident() / 2**20, 2)))
    seconds = time.perf_counter() - started
    x = torch.cat(first, dim=2)[:, :, : len(kept) * c.piece]
    z = net.encoder(x)[0]
    whole = net.decoder(z)[0]
    memory = [m for _, m in rows]
    quarter = len(memory) // 4
    return dict(clip=Path(clip).name, frames=seen, size=list(size), config=repr(c),
                seconds=round(seconds, 2), frames_per_second=round(seen / seconds, 1),
                error=(torch.cat(kept, dim=2) - whole).abs().max().item(), error_frames=x.shape[2],
                whole_clip_mib=round(3 * 4 * frames * size[0] * size[1] / 2**20, 1),  # the pixels alone, which are never held
                growth_mib=round(max(memory[-quarter:]) - max(memory[quarter : 2 * quarter]), 2), rss_mib=rows)


# ---------------------------------------------------------------------------------------------------- command line


def main_eval(argv):
    p = argparse.ArgumentParser(prog="ae.py eval", description="Judge autoencoders on held-out clips: PSNR, SSIM, LPIPS, FVD, flicker, grid.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("weights", nargs="+", help="DC-AE-V or Wan VAE files")
    p.add_argument("--data", default="out/clips", metavar="FOLDER", help="clips; judged is what `training/clips.py` holds out of them")
    p.add_argument("--clips", type=int, default=16, help="how many")
    p.add_argument("--frames", type=int, default=80, help="per clip, as published; fewer where the clips are short")
    p.add_argument("--size", type=video.size_arg, default="256x256", metavar="HxW", help="as published")
    p.add_argument("--stream", type=int, metavar="N", help="instead: the memory while N frames go through, on the film --data")
    p.add_argument("--results", metavar="FILE", help="JSON to write; beside it a contact sheet of three clips")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args(argv)
    nets = {Path(w).stem: load(w).to(a.device) for w in a.weights}
    if a.stream:
        film = a.data if Path(a.data).is_file() else ROOT / "assets" / "bunny.mp4"
        results = {name: stream(net, film, a.stream, a.size) for name, net in nets.items()}
        for name, r in results.items():
            print(f"{name}: {r['frames']} frames of {a.size[0]}x{a.size[1]}, {r['frames_per_second']} per second; {r['rss_mib'][-1][1]} MiB "
                  f"resident at the end, {r['growth_mib']:+} MiB from the second quarter to the last; {r['error']:.1e} from the whole clip "
                  f"({r['error_frames']} frames)")
    else:
        held_out = [(f"clip {i}", x.to(a.device)) for i, x in enumerate(clips.validation(a.data, a.frames, a.size, a.clips))]
        results = {name: evaluate(net, held_out) for name, net in nets.items()}
        print(metrics.format_table({name: r["mean"] for name, r in results.items()}))
        for name, r in results.items():
            print(f"{name}: latent " + ", ".join(f"{k} {v:.4f}" for k, v in r["latent"].items()))
        for column, reason in next(iter(results.values()))["left_out"].items():
            print(f"{column} is left out: {reason}")
        if a.results:
            show(Path(a.results).with_suffix(".png"), nets, held_out[:3])
    if a.results or a.stream:
        path = a.results or "results/streaming.json"
        judged = Path(film).name if a.stream else str(a.data)
        checkpoint.write_json(path, dict(**checkpoint.provenance(), frames=a.stream or a.frames, size=a.size, data=judged, results=results))
        print("wrote", path)


def main_reconstruct(argv):
    r = argparse.ArgumentParser(prog="ae.py reconstruct", description="A video file through the autoencoder: side-by-side mp4, contact "
                                "sheet, PSNR, SSIM.")
    r.add_argument("clip", help="video file")
    toy = ROOT / "weights" / "toy.safetensors"
    r.add_argument("--weights", default=toy, help="official .pt, or .safetensors (default: the toy's)")
    r.add_argument("--out", default="out/reconstruct", help="folder for the results (default: %(default)s)")
    r.add_argument("--frames", type=int, help="read only the first FRAMES frames (default: all)")
    r.add_argument("--size", type=video.size_arg, metavar="HxW", help="scale and crop; 180x320 gives 180 rows (default: as it is)")
    r.add_argument("--compat", action="store_true", help="treat the end of the clip as the released code does: no padding")
    r.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    r.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on the CPU")
    args = vars(r.parse_args(argv))
    device, dtype, weights = torch.device(args.pop("device")), args.pop("dtype"), args.pop("weights")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use: leave --device off, or install a CUDA build of torch.")
    bf16 = dtype == "bf16" or dtype is None and device.type == "cuda"
    choose.choose_kernels(device)
    result = reconstruct(load(weights).to(device, torch.bfloat16 if bf16 else torch.float32), **args)
    n = result["frames"]
    print(f"clip    {n} frames of {result['height']}x{result['width']}, {result['fps']:g} per second")
    print(f"latent  {' x '.join(map(str, result['latent']))}, compression {result['compression']:g}x")
    print(f"PSNR    {result['psnr']:.2f} dB    SSIM {result['ssim']:.4f}")
    for what, s in result["seconds"].items():
        print(f"{what}  {s:.2f} s, {n / s:.1f} frames per second")
    print(f"wrote   {result['written']}.mp4, .png, .json")
