"""The guided velocity: what a solver calls at every step, and how such a step is made fast.

    v = v_null + g (v_text - v_null)          two passes of the transformer (classifier-free guidance, Ho & Salimans 2022)

Exact (equal to rounding), each switched off by `sample.py --slow`:

* **Computed once**, not at every step: keys and values of the prompt, with its hundreds of equal padded rows merged into one, and
  the time vectors of all steps (dit.py).
* **One batch** for both passes where one is too small to fill the machine.
* **One CUDA graph** (`Replay`). A 1.3B pass is some 700 kernels, each launched from Python, which takes some 10 microseconds or more: 7 ms and more, beside 50 ms
  of work for 7,800 tokens, and far more than the work for few. A graph is recorded once and then launched as a whole: no Python, no gaps. (Estimates.)
* **Compiled blocks** (`compile_blocks`, opt-in): what lies between our fused kernels is fused by torch.compile.

Approximate, off by default, with what they cost in quality (results/shortcuts.json, `python -m bench --suite shortcuts`; on the toy,
fewer steps lose less than either of the first two at the same work):

* `interval`: guidance only between two noise levels (Kynkäänniemi et al. 2024, arXiv 2404.07724). At very high noise guidance narrows what can come
  out, at low noise it does little; outside the interval a step is one pass instead of two.
* `reuse`: where the velocity is expected to change by less than this fraction since it was last computed, the last one is taken again
  (the criterion of EasyCache, arXiv 2507.02860). A step then costs nothing.
* fp8 products (gpu/fp8.py).
"""
import warnings
from functools import partial

import torch
import torch.nn.functional as F

import dit
import kernels
from files.checkpoint import UserError
from gpu import fp8 as eight_bits


class Velocity:
    """velocity(x, t) for `flow.solve`: a model's transformer under guidance. Called once per step, in order.

    Wan 2.2's experts take turns, each with its own guidance. A model without condition channels sees its picture in place of latent frame 0, at
    time 0 (spec wan 2.8).

    context, null: prompt states [b m d] of both passes. seen: what `Model.see` makes of the pictures. guidance: a number, or a pair for (low-noise,
    high-noise) expert. timesteps: of the solver. cfg_batch: both passes as one batch. plain: nothing is kept from step to step. graph, compiled,
    fp8, interval (noise levels in 0..1), reuse: see above.
    """

    def __init__(self, model, context, null, seen, guidance, timesteps, cfg_batch=False, plain=False, graph=False, compiled=False, fp8=False,
                 interval=(0.0, 1.0), reuse=0.0):
        check(model, compiled, fp8)
        self.model, self.seen, self.timesteps, self.plain = model, seen, timesteps, plain
        self.low, self.high = guidance if isinstance(guidance, tuple) else (guidance, guidance)
        self.context, self.null, self.cfg_batch = context, null, cfg_batch
        self.graph, self.compiled, self.fp8, self.interval = graph, compiled, fp8, interval
        self.step, self.expert, self.evaluate = 0, None, {}
        self.reuse = Reuse(reuse, len(timesteps))

    def __call__(self, x, t):
        i, now = self.step, self.timesteps[self.step].item()
        self.step += 1
        if self.reuse.enough(x):
            return self.reuse.velocity
        high = now >= 1000 * self.model.boundary  # the high-noise expert, or the only transformer
        if high != self.expert:  # the first step, or the experts change: what belongs to one goes before the other comes
            self.expert, self.net, self.times, self.evaluate = high, None, None, {}
            self.net = prepared(self.model.transformer(now), self.compiled, self.fp8)
            self.times = self.all_times(x)
        scale = self.high if high else self.low
        guided = scale != 1 and self.interval[0] <= now / 1000 <= self.interval[1]
        if guided not in self.evaluate:
            step = partial(self.passes, self.net, self.prompts(guided), scale if guided else None)
            self.evaluate[guided] = Replay(step) if self.graph else step
        v = self.evaluate[guided](x, *self.times[i])
        self.reuse.remember(x, v)
        return v

    def all_times(self, x):
        """What the transformer takes as time, as a tuple of tensors for each step."""
        times = self.timesteps.to(x.device)
        if self.seen.first is not None:  # one time per latent frame: the picture's is 0
            times = times[:, None].repeat(1, x.shape[2])
            times[:, 0] = 0
        return [(t,) for t in times] if self.plain else self.net.times(times)

    def prompts(self, guided):
        """The transformer's arguments after x and time, for each pass."""
        contexts = [self.context] if not guided else [joined(self.context, self.null)] if self.cfg_batch else [self.context, self.null]
        image = lambda c: () if self.seen.clip is None else (self.seen.clip.repeat(len(c) // len(self.context), 1, 1),)
        arguments = [(c, *image(c)) for c in contexts]
        return arguments if self.plain else [(self.net.prompt(*a),) for a in arguments]

    def passes(self, net, prompts, scale, x, *time):
        """One step: latent [b z t h w] and time -> velocity, guided by `scale` unless it is None."""
        x = self.keep_first(x)
        if self.seen.condition is not None:
            x = torch.cat([x, self.seen.condition], dim=1)
        if scale is not None and len(prompts) == 1:  # both passes in one batch
            x = x.repeat(2, 1, 1, 1, 1)
        time = time[0].expand(len(x), *time[0].shape) if self.plain else dit.Time(*time)
        v = torch.cat([net(x, time, *prompt).float() for prompt in prompts])
        if scale is None:
            return v
        v_text, v_null = v.chunk(2)
        return v_null + scale * (v_text - v_null)

    def keep_first(self, x):
        """Put the picture's latent in place of frame 0. The solvers mix values of the same position only, so the other frames come out
        as if this had been done after every step."""
        return x if self.seen.first is None else torch.cat([self.seen.first.expand(len(x), -1, -1, -1, -1), x[:, :, 1:]], dim=2)


def joined(context, null):
    """Both guidance contexts as one batch [2b, m, d]; the shorter gets zero rows, as every prompt has after its end."""
    m = max(context.shape[1], null.shape[1])
    return torch.cat([F.pad(c, (0, 0, 0, m - c.shape[1])) for c in (context, null)])


def check(model, compiled, fp8):
    """UserError where something is asked for that a model with streamed blocks cannot do."""
    if (compiled or fp8) and model.offload == "blocks":
        raise UserError(f"{'--compile' if compiled else '--fp8'} needs all blocks on the device, but here they are streamed: leave it away, or use "
                        "--offload parts.")


def prepared(net, compiled, fp8):
    """The transformer with compiled blocks and fp8 products where asked for; a second call changes nothing."""
    if fp8:
        eight_bits.convert(net)
    if compiled:
        compile_blocks(net)
    return net


def compile_blocks(net, backend="inductor"):
    """Compile each block of a transformer by itself: all are the same code, so one compilation serves all, in seconds instead of minutes.

    `fullgraph`: a part that cannot be compiled is an error instead of a slow detour. Shapes are fixed: a new size compiles anew, a new step or
    prompt of the same length does not.
    """
    if next(net.parameters()).is_cuda:
        kernels.refused()  # tried out now, as this cannot be done while code is being compiled
    for block in net.blocks:
        if block._compiled_call_impl is None:
            block.compile(fullgraph=True, dynamic=False, backend=backend)


# ---------------------------------------------------------------------------------------------------- a step as one graph


def record(function, inputs):
    """Record what `function(*inputs)` does on the GPU -> (a function that does it again, reading and writing the same memory; the output)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(*inputs)
    return graph.replay, output


class Replay:
    """A function of tensors of fixed shapes, run as one CUDA graph from its second call on.

    The first call runs it as it is: libraries load their kernels, compiled code is made. The second records the graph, which executes nothing, and
    from then on inputs are copied to the addresses that the graph reads (a latent: microseconds), and the graph is launched. The kernels are
    the same, so the numbers are, and it does not matter at which step it was recorded. Everything else that the function reads
    (weights, prompt, rotary table) must stay where it is while this object lives; here it lives for one video.

    Where the driver refuses, the function goes on being called as it is, and one warning says why.
    """

    def __init__(self, function):
        self.function, self.calls, self.replay = function, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 2:
            self.inputs = [a.clone() for a in inputs]
            try:
                self.replay, self.output = record(self.function, self.inputs)
            except RuntimeError as e:  # torch.AcceleratorError is one
                warnings.warn(f"the step could not be recorded as a CUDA graph ({str(e).splitlines()[0]}): its kernels are launched one by one, "
                              "with the same result.")
        if self.replay is None:
            return self.function(*inputs)
        for here, a in zip(self.inputs, inputs):
            here.copy_(a)
        self.replay()
        return self.output.clone()  # the next launch overwrites it


# ---------------------------------------------------------------------------------------------------- velocities used again


class Reuse:
    """Which steps may take the last computed velocity again.

    Between the last two computed steps the velocity changed by |dv| while the latent moved by |dx|. If that ratio holds, it changes by
    |dv|/|dx| times the latent's movement in each step from then on. These expected changes, relative to |v|, add up; while the sum stays below
    `threshold`, the velocity is used again. First and last step are always computed. All samples of a batch decide together.
    """

    def __init__(self, threshold, steps):
        self.threshold, self.steps, self.step = threshold, steps, -1
        self.velocity, self.computed, self.before, self.ratio, self.expected = None, None, None, None, 0.0
        self.reused = 0

    def enough(self, x):
        """Is the last velocity good enough for the latent x of the next step?"""
        self.step += 1
        if not self.threshold:
            return False
        if self.ratio is not None and self.step < self.steps - 1:
            self.expected += self.ratio * size(x - self.before) / size(self.velocity)
            if self.expected < self.threshold:
                self.before, self.reused = x, self.reused + 1
                return True
        self.before = x
        return False

    def remember(self, x, v):
        """v was computed for x."""
        if not self.threshold:
            return
        if self.velocity is not None:
            self.ratio = size(v - self.velocity) / max(size(x - self.computed), 1e-12)
        self.velocity, self.computed, self.expected = v, x, 0.0


def size(a):
    return a.abs().mean().item()
