"""What a stage's numbers say against it, and the record that outlives a run."""
import json
import re

import pytest
import torch
from PIL import Image

from training import journal

GOOD = dict(r2=0.8, norm_ratio=0.7, depth={"embedding": 0.2, "0": 0.3, "24": 0.6}, latent_rms=0.96,
            sigma=[dict(sigma=(0.0, 0.2), loss=0.5, bound=0.9, ratio=0.55), dict(sigma=(0.8, 1.0), loss=0.3, bound=0.5, ratio=0.6)])
ABOVE = [dict(sigma=(0.6, 0.8), loss=1.2, bound=1.0, ratio=1.2)]


def test_good_numbers_need_no_words():
    assert journal.sentences(dict(stage="1a, assembled", **GOOD)) == journal.sentences(dict(stage="2, LoRA", **GOOD)) == []


@pytest.mark.parametrize("stage, wrong, says", [
    ("1a, assembled", dict(r2=0.1), r"R\^2 is 0.10: .* do not belong together .see pairs.png"),
    ("high-1a, assembled", dict(r2=-3.0), r"R\^2 is -3.00"),
    ("1a, assembled", dict(norm_ratio=0.01), "noise arrives 0.1 times as loudly as in the base"),
    ("1a, assembled", dict(depth={"embedding": 0.3, "0": 1.1, "20": 1.4}), "behind most blocks the features are farther"),
    ("2, LoRA", dict(latent_rms=0.1), "RMS of 0.10 and should have about 1: the autoencoder's scaling factor is wrong"),
    ("1b, head aligned", dict(sigma=ABOVE), "at sigma 0.6-0.8 the loss is no lower than without any transformer"),
])
def test_a_bad_number_is_told_in_a_sentence(stage, wrong, says):
    (said,) = journal.sentences(dict(stage=stage, **GOOD | wrong))
    assert re.search(says, said) and "\n" not in said


def test_what_is_trained_may_leave_the_base_behind():
    """After stage 1a the embedder is trained for something else; before 1b nothing can denoise."""
    assert not journal.sentences(dict(stage="2, LoRA", **GOOD | dict(r2=-1.0, norm_ratio=50.0, depth={"0": 3.0})))
    assert not journal.sentences(dict(stage="1a, assembled", **GOOD | dict(sigma=ABOVE)))


def test_the_record_goes_on_after_an_interruption(tmp_path, capsys):
    video = torch.linspace(-1, 1, 3 * 4 * 8 * 8).view(3, 4, 8, 8)
    book = journal.Journal(tmp_path, base="toy")
    book.add(dict(stage="1a, assembled", seconds=1.0, **GOOD), [video, -video])
    again = journal.Journal(tmp_path, base="toy")
    assert "1a, assembled" in again and "2, LoRA" not in again
    again.add(dict(stage="2, LoRA", seconds=2.0, **GOOD), [video, -video], ["a", "b"])
    again.add(dict(stage="2, LoRA", seconds=3.0, **GOOD | dict(latent_rms=9.0)), [video, -video], ["a", "b"])  # measured anew
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["stage"], row["seconds"], len(row["says"])) for row in report["stages"]] == [("1a, assembled", 1.0, 0), ("2, LoRA", 3.0, 1)]
    assert report["base"] == "toy" and "commit" in report
    assert Image.open(tmp_path / "stages.png").size == (2 * 6 * 10, 2 * 2 * 10 + 16)  # two prompts; two stages of three frames, with a margin
    said = capsys.readouterr().out
    assert "r2 0.8000" in said and "0.0-0.2: 0.500 (0.900)" in said and "! the latents have an RMS of 9.00" in said
