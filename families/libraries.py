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


def a_class(library, name):
    """A class of one of them by its name. UserError where this version has none such."""
    try:
        found = getattr(library, name, None)
    except RuntimeError as e:  # it is imported now, and something is missing
        reason = str(e).splitlines()[-1]
        raise UserError(f"{name} of {library.__name__} cannot be imported ({reason}): "
                        f"{INSTALL}.") from e
    if found is None:
        raise UserError(f"{library.__name__} {library.__version__} has no {name}: install a "
                        f"version that has it ({INSTALL} --upgrade).")
    return found


def empty_weights():
    """Modules built inside have their parameters on the meta device and their tables real
    (on the meta device itself rotary tables would stay there)."""
    return get("accelerate").init_empty_weights()
