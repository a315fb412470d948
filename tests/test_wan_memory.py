"""What a run needs in memory, and how it is made to fit. (The estimate of a forward against its allocations: test_dit.py.)"""
import pytest
import torch

from files.checkpoint import UserError
from wan import memory, released


@pytest.mark.parametrize("gib, offload, whole", [(200, "none", True), (48, "none", False), (36, "parts", True), (16, "blocks", False)])
def test_the_plan_moves_as_little_as_fits(gib, offload, whole):
    """DC-VideoGen 14B at 720p, 27 GiB of weights, on GPUs of several sizes: known from shapes alone, before anything is loaded."""
    model = released.outline("dc-wan2.1-t2v-14b", torch.bfloat16)
    model.device = torch.device("cuda")
    way, tile, needs = memory.plan(model, 80, (704, 1280), torch.bfloat16, fold=1, free=gib * 2**30)
    assert (way, tile is None) == (offload, whole)
    assert max(needs["denoising_peak"], needs["decode_peak"]) <= 0.9 * gib
    assert 26 < needs["transformer"] < 28


def test_what_cannot_fit_is_refused_before_the_work():
    model = released.outline("wan2.1-t2v-14b", torch.bfloat16)
    model.device = torch.device("cuda")
    with pytest.raises(UserError, match=r"denoising of 81 frames of 720x1280 needs about 10\.. GiB, but cuda has 4.0 GiB free: use a smaller --size"):
        memory.plan(model, 81, (720, 1280), torch.bfloat16, fold=1, free=4 * 2**30)
