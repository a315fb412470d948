"""How a script ends: mistakes told in one sentence, a Ctrl-C in one line, and printing
that cannot fail finished work.

    from files import errors
    errors.begin(__name__)            # the first lines of a script: nothing slow before them
    ...
    if __name__ == "__main__":
        with errors.user_errors():
            main()

Status 0: done; 1: a mistake that the user can mend (`UserError`, a full disk, ...);
130: stopped by Ctrl-C, be it during the imports. What is printed may hold names of files
and prompts: characters that the terminal cannot show are escaped, control characters too.
"""
import contextlib
import errno
import io
import os
import re
import signal
import sys
import warnings


class UserError(Exception):
    """A mistake the user can mend, told in one sentence that says what to do."""


def begin(name):
    """Before the other imports of a file: where it is the script that runs (`__main__`),
    Ctrl-C and printing are safe from now on."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads wait idly
    if name != "__main__":
        return
    for fd in range(3):  # a closed one would be the next file that is opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = SafeOutput(1, sys.stdout), SafeOutput(2, sys.stderr)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    signal.signal(signal.SIGINT, stop_at_once)


def stop_at_once(*_):
    """While modules are imported, where an exception would lose its way."""
    os.write(2, b"stopped; nothing was begun.\n")
    os._exit(130)


@contextlib.contextmanager
def user_errors():
    """Wrap a script's `main`: what the user can mend becomes one sentence on stderr and
    exit status 1. Set `DEBUG=1` to see the traceback instead."""
    begun = signal.getsignal(signal.SIGINT) is stop_at_once
    try:
        if begun:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except KeyboardInterrupt:
        print("stopped; finished work is kept.", file=sys.stderr)
        raise SystemExit(130)
    except Exception as error:
        told = sentence(error)
        if told is None or os.environ.get("DEBUG"):
            raise
        print(f"error: {CONTROL.sub(escape, told)}", file=sys.stderr)
        raise SystemExit(1)
    finally:
        if begun:  # what is left is the interpreter's own end
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def sentence(error):
    """What the user can do about an error; None where nothing is known."""
    if isinstance(error, UserError):
        return str(error)
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory: lower --frames, --size or --batch, or use --device cpu."
    system = system_error(error)
    if system is not None and (system is error or is_full(system)):
        return sentence_of_system(system)
    if isinstance(error, MemoryError):
        return "out of memory: lower --frames, --size or --batch."
    return None


def system_error(error):
    """The OSError that an error is, or that it was raised over (as torch.save does)."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def is_full(error):
    """Does this OSError say that there is no more room on the disk?"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sentence_of_system(error):
    file = error.filename or "a file"
    if is_full(error):
        need = f" ({error.filename2})" if error.filename2 else ""
        return f"the disk is full while writing {file}{need}: free some space and run it again."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return (f"{file} cannot be written or read (permission denied or read-only): "
                "choose another folder with --out.")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{file} is a file, but a folder is needed: choose another one."
    if error.errno == errno.EISDIR:
        return f"{file} is a folder, but a file is needed: choose another one."
    if error.errno == errno.ENAMETOOLONG:
        return f"the name {str(file)[:60]}... is too long: choose a shorter one."
    if error.errno == errno.ENOENT:
        return f"{file} does not exist: check the path."
    return str(error)


@contextlib.contextmanager
def naming(path, size=0):
    """Where the disk fills up in this block, the error names the file that is written
    and the bytes that it needs."""
    try:
        yield
    except OSError as e:
        if not is_full(e):
            raise
        need = f"{size / 1e6:,.1f} MB are needed" if size else None
        raise OSError(errno.ENOSPC, e.strerror, str(path), None, need) from e


# ------------------------------------------------------------------ what people read


#: control characters, but for line ends and tabs; what turns the direction of writing
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
UP = "\x1b[A"  # that tqdm writes, to have several bars


def printable(text):
    """Words that may hold names of files, for people: without control characters, and
    always UTF-8."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


class SafeOutput(io.TextIOWrapper):
    """Standard output or error: what it cannot show is escaped, and where nobody reads
    (closed, a full disk, the end of a pipe) the rest is dropped."""

    def __init__(self, fd, stream):
        raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        encoding = getattr(stream, "encoding", None) or "utf-8"
        line_buffering = fd == 2 or os.isatty(fd)
        super().__init__(raw, encoding, "backslashreplace", line_buffering=line_buffering)
        self.fd = fd

    def write(self, text):
        parts = (CONTROL.sub(escape, part) for part in text.split(UP))
        try:
            super().write(UP.join(parts))
        except OSError:
            self.drop()
        return len(text)

    def flush(self):
        try:
            super().flush()
        except OSError:
            self.drop()

    def drop(self):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fd)
        os.close(nowhere)


def escape(match):
    return match[0].encode("unicode_escape").decode()
