"""What an autoencoder does to video: a film beside its reconstruction, and the table of
the published evaluation. For DC-AE-V and Wan VAE files alike.

    python ae.py reconstruct assets/bunny.mp4
                                        mp4 side by side, contact sheet, PSNR, SSIM
    python ae.py eval A.safetensors Wan2.1_VAE.pth --data CLIPS
                                        a line for each; --results: pictures too
    python ae.py eval toy.safetensors --decoder toy-light.safetensors --data toy --prompts 64
                                        the full decoder beside light ones
"""
import argparse
import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import ae
import toy
from chunk_causal import recut
from files import checkpoint, folders, options, video
from files.checkpoint import UserError
from gpu import choose, tiling
from training import autoencoder, clips, distill, latents, metrics, toy_score
from training.entries import hash_tensors
from training.latents import load_autoencoder as load
from wan import light, released

EMBEDDED = {name: released.WEIGHTS / f"{name}.safetensors" for name in ("film", "toy")}

# ----------------------------------------------------------------------------- one film


@torch.no_grad()
def reconstruct(net, clip, out, frames=None, size=None):
    """A video file through the autoencoder, chunk by chunk -> dict of the results.

    Writes OUT/CLIP_reconstruction.mp4 (original | reconstruction), .png (evenly spaced
    frames of both) and .json (the results; PSNR and SSIM as published). What was made with
    other settings stays; a number is added to the name.
    """
    c, like, info = net.config, next(net.parameters()), video.clip_info(clip)
    h, w = size or (info.height, info.width)
    metrics.check_size(h, w)
    expected = frames or int(info.seconds * info.fps)
    step = max(1, (expected or 8 * c.piece) // 8)  # between the frames of the contact sheet
    psnr, ssim, shown, spent = [], [], [], dict(read=0.0, encode=0.0, decode=0.0)

    def both():
        pieces = video.iter_clip(clip, frames, size, piece=c.piece)
        with tqdm(total=expected or None, desc="reconstruct", unit="frame", leave=False) as bar:
            for x, y in reconstructions(net, pieces, spent):
                next_shown = -len(psnr) % step
                if next_shown < x.shape[2]:
                    shown.append(torch.cat([x, y])[:, :, next_shown::step].clone())
                psnr.extend(metrics.psnr_frames(y, x)[0].tolist())
                ssim.extend(metrics.ssim_frames(y, x)[0].tolist())
                bar.update(x.shape[2])
                yield torch.cat([x, y], dim=4)[0]

    film, labels = Path(clip), ["original", "reconstruction"]
    settings = dict(clip=[film.name, film.stat().st_size, film.stat().st_mtime_ns],
                    weights=hash_tensors(net.state_dict()), frames=frames,
                    size=size and list(size), dtype=str(like.dtype))
    path = folders.free_name(out, f"{film.stem}_reconstruction", settings)
    video.write_video(f"{path}.mp4", both(), info.fps, scale=max(1, 256 // h))
    shown = torch.cat(shown, dim=2)
    video.contact_sheet(f"{path}.png", shown, labels=labels, scale=min(2, 200 / h))
    cell = 3 * c.spatial_factor**2 * c.temporal_factor
    result = dict(
        clip=str(clip), written=str(path), frames=len(psnr), height=h, width=w, fps=info.fps,
        psnr=round(metrics.finite_mean(torch.tensor(psnr)), 3),
        ssim=round(sum(ssim) / len(ssim), 4),
        latent=[c.latent_channels, *net.latent_shape(len(psnr), h, w)],
        compression=cell / c.latent_channels,
        seconds={"encode": round(spent["encode"] - spent["read"], 3),
                 "decode": round(spent["decode"] - spent["encode"], 3)},
        settings=settings, device=str(like.device),
        threads=torch.get_num_threads(), torch=torch.__version__)
    checkpoint.write_json(f"{path}.json", result)
    return result


def reconstructions(net, pieces, spent):
    """Pieces of a clip [3, t, h, w], cut anywhere -> (original, reconstruction), [1, 3, t, h,
    w], as they come. The seconds of reading, of that and encoding, and of all are added to
    `spent`."""
    c, like = net.config, next(net.parameters())
    whole = recut((x[None] for x in pieces), 3, c.piece, c.lead + c.piece - c.temporal_factor)
    originals, copies = itertools.tee(timed(whole, "read", spent))
    z = timed(net.encode_stream(x.to(like) for x in originals), "encode", spent)
    for y, x in zip(timed(net.decode_stream(z), "decode", spent), copies):
        yield x, y[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].to(x)


def timed(pieces, name, spent):
    """Pass pieces on, and add the seconds that they take to come to spent[name]."""
    pieces = iter(pieces)
    while True:
        started = time.perf_counter()
        piece = next(pieces, None)
        if piece is not None and piece.is_cuda:
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - started
        if piece is None:
            return
        yield piece


# ---------------------------------------------------------------- many clips: the table


def evaluate(net, held_out):
    """`metrics.evaluate` for either kind of autoencoder, and the statistics of its raw
    latents. held_out: list of (name, x [3, t, h, w])."""
    c, like, seen = net.config, next(net.parameters()), []

    def reconstruction(x):
        z = net.encode(x.to(like))
        seen.append(z.float().cpu())
        return net.decode(z, x.shape[2], x.shape[3:])

    borders = {"latent frame": (c.temporal_factor, c.lead % c.temporal_factor)}
    if hasattr(c, "chunk"):
        borders["chunk"] = (c.chunk, 0)
    result = metrics.evaluate(reconstruction, held_out, borders, c.spatial_factor)
    seen = seen[: len(held_out)]  # what follows are fields of one colour
    return dict(**result, latent=metrics.latent_statistics(seen) | latents.report(torch.cat(seen)))


@torch.no_grad()
def side_by_side(nets, held_out):
    """{name: autoencoder} of one latent, the full decoder first, in turns on the same
    latents -> {name: dict(psnr_full, ms, mib)}: PSNR to the full decoder in dB, median
    time of a frame, estimated memory of the decode beside the weights."""
    full, times, psnr = next(iter(nets)), defaultdict(list), defaultdict(list)
    for _, x in [held_out[0], *held_out]:  # the first clip once more, to warm up
        z, made = nets[full].encode(x[None].to(next(nets[full].parameters()))), {}
        for name, net in nets.items():
            spent = {name: 0.0}
            made[name] = torch.cat(list(timed(net.decode_stream(z), name, spent)), dim=2)
            times[name].append(spent[name] / made[name].shape[2])
            psnr[name].append(metrics.psnr_frames(made[name], made[full])[0])
    found = {}
    for name, net in nets.items():
        dtype = next(net.parameters()).dtype
        found[name] = dict(ms=1000 * statistics.median(times[name][1:]),
                           mib=tiling.peak(net, "decoder", z.shape[2:], dtype=dtype) / 2**20)
        if name != full:
            found[name]["psnr_full"] = metrics.finite_mean(torch.cat(psnr[name][1:]))
    return found


@torch.no_grad()
def prompt_fits(nets, model, count):
    """{name: autoencoder} of one latent -> {name: prompt fit} of what a toy model makes
    of `count` held-out prompts, decoded by each."""
    like = next(next(iter(nets.values())).parameters())
    prompts, fits = toy.held_out_prompts(count), {}
    made = distill.generate(model, prompts)
    for name, net in nets.items():
        videos = [net.decode(z.to(like), model.frames, model.size) for z in made.split(16)]
        fits[name] = toy_score.prompt_fit(torch.cat(videos).float().cpu(), prompts)["mean"]
    return fits


@torch.no_grad()
def show(path, nets, held_out):
    """A contact sheet: clip by clip, four frames of the original and of what each of
    {name: autoencoder} makes."""
    rows, labels = [], []
    for _, x in held_out:
        rows.append(x.cpu())
        labels += ["original", *nets]
        for net in nets.values():
            y = net(x[None].to(next(net.parameters())))
            rows.append(y[0].float().cpu())
    scale = max(1, 192 // rows[0].shape[2])
    video.contact_sheet(path, rows, columns=4, labels=labels, scale=scale)


# ------------------------------------------------------------------------- command line


def eval_arguments(argv):
    """-> (arguments, names of those that were given)"""
    p = options.Parser(
        prog="ae.py eval", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Judge autoencoders on held-out clips: PSNR, SSIM, LPIPS, FVD, flicker, grid.")
    p.add_argument("weights", nargs="*", default=argparse.SUPPRESS,
                   help="DC-AE-V or Wan VAE files; none: the embedded one for film, or toy clips")
    p.add_argument("--decoder", nargs="+", metavar="FILE", default=(),
                   help="light decoders of this latent, to set beside its own")
    p.add_argument("--data", default="out/clips", metavar="FOLDER",
                   help="clips; judged is what training/clips.py holds out of them; toy: clips of "
                   "the toy world")
    p.add_argument("--clips", type=options.whole(1, 100_000), default=16, help="how many")
    p.add_argument("--frames", type=options.whole(1, 100_000), default=80,
                   help="per clip, as published; fewer where the clips are short")
    p.add_argument("--size", type=video.size_arg, default=(256, 256), metavar="HxW",
                   help="as published")
    p.add_argument("--prompts", type=options.whole(1, 100_000), metavar="N",
                   help="of the toy: how well videos of N held-out prompts fit them, decoded")
    p.add_argument("--model", default="dc", help="whose videos these are")
    p.add_argument("--base", nargs="+", metavar="FILE",
                   help="weights of a base's autoencoder, and of its transformer: R^2 to it")
    p.add_argument("--results", metavar="FILE",
                   help="JSON to write; beside it a contact sheet of three clips")
    p.add_argument("--device", type=options.device, default=options.DEVICE)
    p.refuse_gone({"--stream": "the memory of an endless stream was measured by this script as of "
                   "commit 0fe0031, results/streaming.json"})
    args, given = p.parse(argv)
    if not args.prompts:
        p.refuse("a run without --prompts", given & {"model"})
    if not getattr(args, "weights", None):
        args.weights = [EMBEDDED["toy" if args.data == "toy" else "film"]]
    if args.results:
        folders.writable_file(args.results)
    return args, given


def main_eval(argv):
    args, given = eval_arguments(argv)
    nets = autoencoders(args)
    if args.prompts:
        model = distill.toy_model(args.model, next(iter(nets.values())), args.device)
    films = [x.to(args.device) for x in held_out_clips(args, given)]
    held_out = [(f"clip {i}", x) for i, x in enumerate(films)]
    results = {name: evaluate(net, held_out) for name, net in nets.items()}
    if args.base:
        teacher = latents.Teacher(args.base, args.device)
        for name, net in nets.items():
            found = latents.r_squared(teacher, net, films)
            results[name]["latent"]["r_squared"] = found
    if args.decoder:
        for name, found in side_by_side(nets, held_out).items():
            results[name]["mean"] |= found
    if args.prompts:
        for name, fit in prompt_fits(nets, model, args.prompts).items():
            results[name]["mean"]["fit"] = fit
    print(metrics.format_table({name: r["mean"] for name, r in results.items()}))
    for name, r in results.items():
        told = ", ".join(f"{k} {v:.4f}" for k, v in r["latent"].items())
        print(f"{name}: latent {told}")
    for column, reason in next(iter(results.values()))["left_out"].items():
        print(f"{column} is left out: {reason}")
    if args.results:
        show(Path(args.results).with_suffix(".png"), nets, held_out[:3])
        settings = dict(frames=args.frames, size=args.size, data=str(args.data))
        document = dict(**checkpoint.provenance(), **settings, results=results)
        checkpoint.write_json(args.results, document)
        print("wrote", args.results)


def autoencoders(args):
    """{name: autoencoder} that `main_eval` is to judge, light decoders last."""
    files = [*args.weights, *args.decoder]
    if len({Path(file).stem for file in files}) < len(files):
        raise UserError("two of the weights have the same name: rename one.")
    if (args.decoder or args.prompts) and len(args.weights) > 1:
        raise UserError("--decoder and --prompts are about one latent: give one autoencoder.")
    nets = {Path(file).stem: load(file).to(args.device) for file in args.weights}
    full = next(iter(nets.values()))
    if (args.decoder or args.prompts) and not isinstance(full, ae.DCAEV):
        raise UserError("--decoder and --prompts are for a DC-AE-V: leave them out.")
    return nets | {Path(file).stem: light.load(full, file) for file in args.decoder}


def held_out_clips(args, given):
    """Clips [3, t, h, w] that nobody trained on; of the toy world in its own size if
    none is given."""
    if args.data != "toy":
        metrics.check_size(*args.size)
        return clips.validation(args.data, args.frames, args.size, args.clips)
    if "frames" not in given:
        args.frames = toy.FRAMES
    if "size" not in given:
        args.size = (toy.SIZE, toy.SIZE)
    if args.size[0] != args.size[1]:
        raise UserError("the toy world is square: give --size as NxN.")
    return list(toy.toy_batch(autoencoder.HELD_OUT, args.clips, args.frames, args.size[0])[0])


def main_reconstruct(argv):
    p = options.Parser(
        prog="ae.py reconstruct", description="A video file through the autoencoder: "
        "side-by-side mp4, contact sheet, PSNR, SSIM.")
    p.add_argument("clip", help="video file")
    p.add_argument("--weights", default=EMBEDDED["film"],
                   help="official .pt, or .safetensors (default: the embedded one for film)")
    p.add_argument("--out", default="out/reconstruct",
                   help="folder for the results (default: %(default)s)")
    p.add_argument("--frames", type=options.whole(1, 10**7),
                   help="read only the first FRAMES frames (default: all)")
    p.add_argument("--size", type=video.size_arg, metavar="HxW",
                   help="scale and crop; 180x320 gives 180 rows (default: as it is)")
    p.add_argument("--device", type=options.device, default=options.DEVICE,
                   help="default: %(default)s")
    p.add_argument("--dtype", choices=options.TYPES,
                   help="default: bf16 on a GPU, fp32 on the CPU")
    p.refuse_gone({"--compat": "a clip's end is padded and cropped; what the released code did "
                   "with it, tests/test_ae.py holds"})
    args, _ = p.parse(argv)
    device = args.device
    folders.writable(args.out)
    choose.choose_kernels(device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    net = load(args.weights).to(device, options.TYPES[dtype])
    result = reconstruct(net, args.clip, args.out, args.frames, args.size)
    n, size = result["frames"], f"{result['height']}x{result['width']}"
    print(f"clip    {n} frames of {size}, {result['fps']:g} per second")
    latent = " x ".join(map(str, result["latent"]))
    print(f"latent  {latent}, compression {result['compression']:g}x")
    print(f"PSNR    {result['psnr']:.2f} dB    SSIM {result['ssim']:.4f}")
    for what, seconds in result["seconds"].items():
        print(f"{what}  {seconds:.2f} s, {n / seconds:.1f} frames per second")
    print(f"wrote   {result['written']}.mp4, .png, .json")
