"""The plan before the bill: what is counted is what the networks do, and the memory is
what training took where it was measured."""
import dataclasses
import re

import pytest
import torch

import adapt
import ae
import dit
import lora
from conftest import ROOT
from files import checkpoint
from files.checkpoint import UserError
from training import bases, plan
from wan import memory

SMALL = dit.Config(dim=64, ffn_dim=256, heads=2, layers=2, in_channels=8, out_channels=8, patch=(1, 1, 1), text_dim=32, text_len=64)
LATENT = (3, 10, 12)
SETTINGS = bases.Settings(rank=8, batch=2)


def test_the_forward_pass_is_that_of_the_formula():
    """Counted operation by operation: `memory.flops`, but for the time MLPs, one row of
    which goes through; with an image branch too."""
    for config in (dataclasses.replace(SMALL, layers=1), dataclasses.replace(SMALL, layers=1, in_channels=20, image_dim=48)):
        net = plan.transformer(config, "1b", SETTINGS)
        counted = plan.step(net, LATENT, 2).forward / 2
        times = 2 * sum(p.numel() for n, p in net.named_parameters() if n.startswith("time_") and p.ndim == 2)
        assert counted - times == pytest.approx(memory.flops(config, LATENT).total, rel=1e-9)


def test_what_a_frozen_block_costs():
    """Per block: linear layers once forward and once backward, trained ones (LoRA)
    twice backward, attention 2.5 times backward; recomputed: one more forward pass. The
    prompt's keys and values need no gradient."""
    def per_block(stage, again):
        costs = [plan.step(plan.transformer(dataclasses.replace(SMALL, layers=n), stage, dataclasses.replace(SETTINGS, checkpoint_blocks=again)), LATENT, 1)
                 for n in (1, 2)]
        return costs[1].forward - costs[0].forward, costs[1].total - costs[0].total

    one, two = (memory.flops(dataclasses.replace(SMALL, layers=n), LATENT) for n in (1, 2))
    linear, attention, context = two.linear - one.linear, two.attention - one.attention, 4 * SMALL.text_len * SMALL.dim**2
    forward, total = per_block("1b", False)
    assert forward == linear + attention and total == 2 * linear - context + 3.5 * attention
    assert per_block("1b", True)[1] - total == pytest.approx(forward, rel=0.05)  # all but its last product, which nobody needs
    thin = 2 * dit.tokens(SMALL, LATENT) * sum(p.numel() for _, a in lora.adapters(plan.transformer(SMALL, "2", SETTINGS).blocks[0]) for p in (a.down, a.up))
    assert per_block("2", False) == (forward + thin, total + 3 * thin)


def test_two_and_three_blocks_tell_the_rest():
    config = dataclasses.replace(SMALL, layers=4)
    whole = plan.step(plan.transformer(config, "2", SETTINGS), LATENT, 2, gradients=True)
    assert plan.training_step(config, "2", SETTINGS, LATENT, gradients=True) == pytest.approx(whole, rel=1e-6)


def test_memory_part_by_part():
    """Weights, masters and moments are those of the real modules; sharded they are a
    quarter on each of four GPUs; recomputing saves activations."""
    parts, _ = plan.memory(SMALL, "2", SETTINGS, LATENT)
    net = plan.transformer(SMALL, "2", SETTINGS)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    ends = sum(p.numel() for end in net.ends for p in net.get_submodule(end).parameters())
    assert trained == ends + sum(a.down.numel() + a.up.numel() for _, a in lora.adapters(net))
    assert [parts[k] / trained for k in ("trained weights", "gradients", "Adam moments", "average")] == [4, 4, 8, 4]
    matrices = sum(p.numel() for n, p in net.named_parameters() if not p.requires_grad and p.dtype == torch.bfloat16)
    rest = sum(p.numel() for p in net.parameters() if not p.requires_grad) - matrices
    assert parts["frozen weights"] == 2 * matrices + 4 * rest and matrices > rest
    assert plan.memory(SMALL, "1b", SETTINGS, LATENT)[0]["average"] == 0  # stage 1b has none
    cut, _ = plan.memory(SMALL, "2", SETTINGS, LATENT, gpus=4, sharded=True)
    assert [cut[k] / parts[k] for k in ("frozen weights", "gradients", "Adam moments")] == [0.25, 0.25, 0.25] and cut["gathered"] > 0
    kept, _ = plan.memory(SMALL, "2", dataclasses.replace(SETTINGS, checkpoint_blocks=False), LATENT)
    assert kept["activations"] > 1.4 * parts["activations"]


def test_it_was_within_15_percent_of_what_training_took():
    """results/plan.json, measured on a processor: every case; and its figures are still
    those of this code."""
    rows = checkpoint.read_json(ROOT / "results" / "plan.json")["rows"]
    assert len(rows) == 10 and all(abs(row["planned"] / row["measured"] - 1) < 0.15 for row in rows)
    for row in rows[::3]:
        shape = {name: row[name] for name in ("dim", "ffn_dim", "heads", "layers")}
        config = dit.Config(in_channels=32, out_channels=32, patch=(1, 1, 1), text_dim=512, **shape)
        settings = bases.Settings(rank=row["rank"], dtype=row["dtype"], batch=2,
                                  checkpoint_blocks=row["checkpoint_blocks"])
        parts, _ = plan.memory(config, row["stage"], settings, tuple(row["latent"]),
                               accumulate=row["accumulate"])
        assert sum(parts.values()) == pytest.approx(row["planned"], rel=0.02)


def test_encoding_a_clip():
    """80 frames of 480x832 are 503 T multiply-adds for DC-AE-V's encoder (spec dc-ae-v
    9)."""
    with torch.device("meta"):
        net = ae.DCAEV(ae.PRESETS["f32t4c32"])
    assert plan.encoding(net, 80, (480, 832)) == pytest.approx(2 * 503e12, rel=0.005)


def test_the_plan_of_14b():
    """Parameters as in spec 5.3, operations of stage 1b as in spec 9.6; it fits eight
    H100, and all that with the blocks kept does not."""
    config, settings = dit.deep_config(dit.PRESETS["wan2.1-t2v-14b"], ae.PRESETS["f32t4c32"]), bases.BASES["wan2.1-t2v-14b"].settings
    net = plan.transformer(config, "2", settings)
    assert sum(p.numel() for _, a in lora.adapters(net) for p in (a.down, a.up)) == pytest.approx(820.6e6, rel=1e-4)
    parts, cost = plan.memory(config, "1b", settings, (20, 15, 26), gpus=8, sharded=True, accumulate=2)
    assert cost.total / settings.batch * 32 * 6000 == pytest.approx(1.5e20, rel=0.05)
    assert sum(parts.values()) < 30 * 2**30
    assert plan.training_step(config, "1b", dataclasses.replace(settings, checkpoint_blocks=False), (20, 15, 26), gradients=True).peak > 80e9


@pytest.mark.core
def test_the_plan_of_the_default_base(capsys, monkeypatch):
    """The toy's, with one block: all stages, every way to hold it, caches."""
    small = dataclasses.replace(dit.PRESETS["toy-base"], layers=1)
    monkeypatch.setitem(dit.PRESETS, "toy-base", small)
    adapt.main(["--plan"])
    text = capsys.readouterr().out
    assert "to f16t4c32 on 1 GPU\n" in text and "paper: 10 H100 GPU-days" in text
    assert len(re.findall(r"^\| (?:1b|2), whole", text, re.M)) == 4 and "base latent" in text
    adapt.main(["--plan", "--gpus", "2", "--batch", "8", "--steps", "100"])
    text = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:1b|2), ", text, re.M)) == 8
    assert "0 H100 hours (0.0 GPU-days) at 40%" in text  # it is a toy
    with pytest.raises(UserError, match="cannot be divided among 3 processes"):
        adapt.main(["--plan", "--gpus", "3"])
