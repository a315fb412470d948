"""How a script ends, each time in a process of its own: with one line, the right status, and
whatever happens to what it prints."""
import errno
import os
import subprocess
import sys

import pytest

from files import ROOT, errors

BEGIN = "from files import errors; errors.begin('__main__')\nimport os, signal, time\n"
MAIN = BEGIN + "with errors.user_errors():\n"


def run(code, shell='exec "$0" -c "$1"', **environment):
    """-> (status, what it printed, what it said on stderr) of Python code."""
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=ROOT, capture_output=True,
                          env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.core
@pytest.mark.parametrize("encoding, shown", [
    ("utf-8", "猫 \\x1b[2J \\x07 \\udce9".encode()), ("cp1252", rb"\u732b \x1b[2J \x07 \udce9"),
    ("ascii", rb"\u732b \x1b[2J \x07 \udce9")])
def test_what_a_terminal_cannot_show_or_obeys_is_escaped(encoding, shown):
    printed = MAIN + "    print('\\u732b \\x1b[2J \\x07 \\udce9')"
    assert run(printed, PYTHONIOENCODING=encoding) == (0, shown + b"\n", "")


@pytest.mark.parametrize("shell", [
    'exec "$0" -c "$1" >&-', 'exec "$0" -c "$1" 2>&-', 'exec "$0" -c "$1" >&- 2>&-',
    'exec "$0" -c "$1" >/dev/full 2>/dev/full',
    '{ "$0" -c "$1"; echo $? >&3; } 3>&2 | true'])
def test_printing_cannot_fail_a_finished_run(shell):
    many = MAIN + ("    for i in range(9999): print('words')\n    print('x', file=sys.stderr)\n"
                   "    print('done', flush=True)")
    status, _, said = run(many.replace("import os", "import sys, os"), shell)
    assert status == 0 and "Traceback" not in said and said.strip() in ("", "x", "0", "x\n0")


def test_a_file_does_not_take_the_place_of_a_closed_stderr(tmp_path):
    code = MAIN + f"    f = open({str(tmp_path / 'a')!r}, 'w'); os.write(2, b'noise'); f.write('b')"
    assert run(code, 'exec "$0" -c "$1" 2>&-')[0] == 0
    assert (tmp_path / "a").read_text() == "b"


@pytest.mark.parametrize("code, said", [
    (BEGIN + "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "stopped; nothing was begun.\n"),
    (BEGIN + "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n"
     "except BaseException: pass", "stopped; nothing was begun.\n"),
    (MAIN + "    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
     "stopped; finished work is kept.\n")])
def test_a_ctrl_c_is_one_line_and_status_130(code, said):
    assert run(code) == (130, b"", said)


@pytest.mark.parametrize("script", ["sample.py", "adapt.py", "ae.py"])
def test_the_scripts_are_safe_before_their_slow_imports(script):
    """A Ctrl-C while the first of them is imported."""
    lines = (ROOT / script).read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from ", "errors.begin"))]
    assert imports[:2] == ["from files import errors",
                           "errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads"]


def test_a_full_disk_is_known_by_its_file_and_size_also_below_another_error(capsys):
    """torch.save raises a RuntimeError over the OSError."""
    with pytest.raises(SystemExit) as e, errors.user_errors():
        try:
            with errors.naming("W/t/checkpoint", 12_345_678):
                raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert e.value.code == 1 and capsys.readouterr().err == (
        "error: the disk is full while writing W/t/checkpoint (12.3 MB are needed): free some space "
        "and run it again.\n")


@pytest.mark.parametrize("number, says", [
    (errno.EEXIST, "a is a file, but a folder is needed"), (errno.EISDIR, "a is a folder, but a file"),
    (errno.ENOENT, "a does not exist"), (errno.EROFS, "a cannot be written or read")])
def test_what_the_system_says_becomes_a_sentence(number, says):
    assert errors.sentence(OSError(number, os.strerror(number), "a")).startswith(says)


def test_a_bug_is_no_mistake_of_the_user():
    with pytest.raises(ValueError), errors.user_errors():
        raise ValueError("a bug")
