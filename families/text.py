"""Prompts, through the text encoders that a folder of diffusers holds: loaded when a prompt
is new, and freed right after, for they are larger than most transformers. The face of
wan.text.WanText.

How a prompt becomes states is the pipeline's own function, called by a row's `encode`; what
its transformer reads, and no padding, is kept.
"""
import hashlib
from pathlib import Path

import torch

from families import libraries
from files import checkpoint
from files.checkpoint import UserError
from wan.memory import free_memory
from wan.models import Prompts
from wan.text import release


class Text:
    """text(sentences) -> wan.models.Prompts.

    folder: a pipeline's. index: its model_index.json. dim: width of the states. Encoders
    compute in the type that they are stored in.
    """

    def __init__(self, folder, family, index, dim, device="cpu"):
        self.folder, self.family, self.index = Path(folder), family, index
        self.text_dim, self.device = dim, device
        self.encoder_path = self.folder / "text_encoder"
        self.known = {}

    @property
    def made_by(self):
        """What decides the states beside the first encoder's weights, in plain values."""
        digest = hashlib.sha256()
        for name, value in self.projection().items():
            if name.endswith("bias"):  # as telling as the weight, and small
                digest.update(value.read().float().numpy().tobytes())
        return dict(family=self.family.name, projection=digest.hexdigest()[:16])

    def projection(self):
        """The transformer's layer that encodes prompts further -> {name: Stored}."""
        if not self.family.projection:
            return {}
        tensors = checkpoint.open_tensors(self.folder / "transformer")[0]
        return {k: v for k, v in tensors.items() if k.startswith(self.family.projection)}

    def __call__(self, prompts):
        self.known |= self.states(prompts)
        return Prompts(self.known[p] for p in prompts).each(torch.Tensor.float)

    def states(self, prompts):
        """List of sentences -> {sentence: {name: states}}. What is new is not kept here: a
        million captions would fill the memory."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        known = self.known | (self.encode(new) if new else {})
        return {p: known[p] for p in prompts}

    @staticmethod
    def collate(rows):
        """List of {name: states} -> Prompts."""
        return Prompts(rows)

    def stored_bytes(self):
        """Size of the text encoders' files."""
        total = 0
        for part in self.family.text:
            for file in (self.folder / part).glob("*.safetensors"):
                total += file.stat().st_size
        return total

    @torch.no_grad()
    def encode(self, prompts):
        """-> {prompt: {name: states [m, d]}}, on the CPU."""
        device, need = torch.device(self.device), self.stored_bytes()
        if need > (free := free_memory(device)):
            raise UserError(f"the text encoder of {self.folder} takes {need / 2**30:.1f} GiB, but "
                            f"{device} has {free / 2**30:.1f} GiB free: encode the prompts where "
                            "there is more (adapt.py --stage cache), and use that --cache here.")
        parts = {name: self.load(name) for name in self.family.text}
        parts |= {k: v.read().to(device) for k, v in self.projection().items()}
        rows = self.family.encode(parts, prompts)
        del parts
        release()
        return dict(zip(prompts, Prompts(rows).to("cpu")))

    def load(self, part):
        """A part by its class in the index."""
        name, path = self.index[part][1], self.folder / part
        library = libraries.transformers()
        if part.startswith("tokenizer"):
            # a processor of pictures would ask for torchvision; its tokenizer does not
            return library.AutoTokenizer.from_pretrained(path, local_files_only=True)
        kind = libraries.a_class(library, name)
        net = kind.from_pretrained(path, dtype="auto", local_files_only=True)
        return net.eval().requires_grad_(False).to(self.device)
