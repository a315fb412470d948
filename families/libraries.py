"""diffusers, transformers and accelerate: imported when a base of theirs is first used."""
import contextlib
import importlib
import os

from files.checkpoint import UserError

INSTALL = "pip install diffusers transformers accelerate"


def get(name):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder has all that is needed
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"a base in diffusers' layout needs its packages ({e}): "
                        f"{INSTALL}.") from e
    with contextlib.suppress(AttributeError):
        module.utils.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
    return module


def diffusers():
    return get("diffusers")


def transformers():
    return get("transformers")


def empty_weights():
    """Modules built inside have their parameters on the meta device and their tables real
    (on the meta device itself rotary tables would stay there)."""
    return get("accelerate").init_empty_weights()
