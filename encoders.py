"""What conditions the transformer.

So far one text encoder: the toy's vocabulary. The toy prompt "a large red circle moving left slowly on a blue background" becomes one row
per attribute (size, colour, shape, direction, speed, background), each a one-hot vector of the word; rows of attributes
that the prompt leaves out, and the rows up to text_len, are zeros, like the rows past the end of a Wan prompt. The null prompt of
classifier-free guidance is all zeros.

    ToyText()(["a red circle", ...]) -> context [b, 8, 32]
"""
import re
import warnings

import torch

from checkpoint import UserError
from data import WORLD

SYNONYMS = {"grey": "gray", "big": "large", "huge": "large", "tiny": "small", "little": "small", "disc": "circle", "disk": "circle",
            "ball": "circle", "box": "square", "donut": "ring", "magenta": "purple", "violet": "purple", "fast": "quickly",
            "quick": "quickly", "rapidly": "quickly", "slow": "slowly", "leftward": "left", "leftwards": "left", "rightward": "right",
            "rightwards": "right", "upward": "up", "upwards": "up", "downward": "down", "downwards": "down", "backdrop": "background"}
FILLERS = set("a an the is on over in of at to towards with and it that which moves moving moved drifting going flying gliding sliding "
              "shape object background before against front video clip showing".split())


class ToyText:
    """Toy prompts -> context rows. Rules in place of a network; the interface is that of any text encoder here."""

    text_len, text_dim = 8, 32

    def __init__(self):
        words = [(name, word) for name in WORLD for word in WORLD[name]]
        self.row = {name: i for i, name in enumerate(WORLD)}
        self.column = {key: i for i, key in enumerate(words)}

    def parse(self, prompt):
        """Prompt -> ({attribute: word}, [words left out]). A colour right before "background" is the background's. Left out is what the
        toy does not know, and a second word for the same attribute: there is one object."""
        words = [SYNONYMS.get(w, w) for w in re.findall(r"[^\W\d_]+", prompt.lower())]
        found, unknown = {}, []
        for word, following in zip(words, words[1:] + [""]):
            slots = ["background"] if following == "background" else [name for name in WORLD if name != "background"]
            slot = next((name for name in slots if word in WORLD[name]), None)
            if slot and found.setdefault(slot, word) == word or word in FILLERS:
                continue
            unknown.append(word)
        return found, unknown

    def encode(self, attributes):
        """List of {attribute: word} -> context [b, 8, 32]."""
        context = torch.zeros(len(attributes), self.text_len, self.text_dim)
        for b, given in enumerate(attributes):
            for name, word in given.items():
                context[b, self.row[name], self.column[name, word]] = self.text_dim**0.5
        return context

    def __call__(self, prompts):
        """List of sentences -> context [b, 8, 32]. Warns of words it does not know; a prompt without any known word is a UserError."""
        attributes = []
        for prompt in prompts:
            found, unknown = self.parse(prompt)
            if not found:
                raise UserError(f"the toy model knows no word of {prompt!r}. {self.vocabulary()}")
            if unknown:
                warnings.warn(f"the toy model leaves out {', '.join(map(repr, dict.fromkeys(unknown)))}. {self.vocabulary()}")
            attributes.append(found)
        return self.encode(attributes)

    def null(self, n):
        """The unconditional context, [n, 8, 32]."""
        return torch.zeros(n, self.text_len, self.text_dim)

    @staticmethod
    def vocabulary():
        return "It knows " + "; ".join(f"{name}: {', '.join(words)}" for name, words in WORLD.items()) + "."
