"""Where compiled kernels are kept: nothing that a folder, a disk or another process does reaches a forward."""

import ast
import errno
import functools
import importlib.util
import inspect
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numba.core import config

import normkit
from normkit.kernels.numba import compiled, kernel_cache
from normkit.kernels.numba.channels import kernels as channel_kernels
from normkit.kernels.numba.channels import launch
from normkit.kernels.numba.samples import kernels as sample_kernels
from tolerances import assert_close

SMALL = ("given", "float32", None, False)  # a kernel that is compiled in half a second
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def folders(tmp_path, monkeypatch, python_path) -> Path:
    """Give the cache a package, a home and a temporary folder of its own, none of which holds anything.

    Calls go by Python's path, for a native call asks for the kernels of a shape once in a process.
    """
    for name in ("package", "home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(kernel_cache, "_warned", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    real = compiled._Kernel._compile_uncached
    monkeypatch.setattr(compiled._Kernel, "_compile_uncached", lambda kernel: compile_once(real, kernel))
    return tmp_path


COMPILED: dict[str, Any] = {}


def compile_once(compile_anew: Callable[..., Any], kernel: compiled._Kernel) -> Any:
    """Compile a kernel for all tests: they ask where the result goes, not what it is."""
    key = f"{kernel.__name__} {kernel._sig}"
    if key not in COMPILED:
        COMPILED[key] = compile_anew(kernel)
    return COMPILED[key]


@pytest.fixture
def asked(folders, monkeypatch) -> Path:
    """Name a folder, as the variable does."""
    monkeypatch.setattr(config, "CACHE_DIR", str(folders / "asked"))
    return folders / "asked"


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def load(name=SMALL):
    """Ask for a kernel as a new process does."""
    return compiled._kernel.__wrapped__(channel_kernels.KERNELS, *name)


def check_forward(monkeypatch) -> None:
    """Run a layer on kernels that are asked for anew, and compare it with the formula."""
    monkeypatch.setattr(compiled, "_kernel", functools.cache(compiled._kernel.__wrapped__))
    monkeypatch.setattr(launch, "kernel", functools.cache(inspect.unwrap(launch.kernel)))
    # The contract that tests hold launches to knows no kernel that is asked for past it.
    monkeypatch.setattr(launch, "parallel_for", inspect.unwrap(launch.parallel_for))
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    expected = (wide - wide.mean((0, 2, 3), keepdim=True)) / (
        wide.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    layer = normkit.BatchNorm2d(2)
    assert normkit.explain(layer, x).backend == "numba"
    assert_close(layer(x), expected, dtype=torch.float32)


def test_a_kernel_is_kept_beside_the_code_and_found_again(folders):
    assert load().cache_hits == 0
    (file,) = kept(folders)
    assert file.parent == folders / "package" / "__pycache__"
    assert load().cache_hits == 1


@pytest.mark.parametrize("given", ["asked", "deep/er", "relative"])
def test_the_named_folder_is_made_and_used(folders, monkeypatch, given):
    monkeypatch.setattr(config, "CACHE_DIR", given if given == "relative" else str(folders / given))
    load()
    (file,) = kept(folders)
    assert file.is_relative_to(folders / given)
    assert load().cache_hits == 1


def test_the_named_folder_gets_what_is_kept_elsewhere(folders, monkeypatch):
    load()
    monkeypatch.setattr(config, "CACHE_DIR", str(folders / "asked"))
    assert load().cache_hits == 1
    assert len(kept(folders / "asked")) == 1


def _pickled(content: bytes) -> bytes:
    return pickle.dumps({"not": "a kernel"})


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the digest": lambda content: content[:10],
    "cut": lambda content: content[:100],
    "cut at the end": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "another pickle": _pickled,
    "another pickle with a digest": lambda content: content[:32] + _pickled(content),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_compiled_anew_and_replaced(folders, name):
    load()
    (file,) = kept(folders)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[name](whole))
    assert load().cache_hits == 0
    assert kept(folders) == [file]
    assert load().cache_hits == 1


def test_damaged_files_do_not_reach_a_number(folders, monkeypatch):
    check_forward(monkeypatch)
    for file in kept(folders):
        file.write_bytes(file.read_bytes()[:1000])
    check_forward(monkeypatch)


def test_a_file_under_the_name_of_another_kernel_is_not_taken(folders):
    load()
    (one,) = kept(folders)
    load(("given", "float64", None, False))
    (other,) = set(kept(folders)) - {one}
    shutil.copy(one, other)
    assert load(("given", "float64", None, False)).cache_hits == 0
    assert load(("given", "float64", None, False)).cache_hits == 1


def test_a_changed_source_replaces_the_kernel(folders, monkeypatch):
    load()
    monkeypatch.setitem(channel_kernels.KERNELS.__dict__, "revision", "changed")
    assert load().cache_hits == 0
    assert load().cache_hits == 1
    assert len(kept(folders)) == 1


@pytest.mark.parametrize("kernels", [channel_kernels.KERNELS, sample_kernels.KERNELS], ids=["channels", "samples"])
def test_the_revision_counts_every_module_that_a_kernel_is_made_of(kernels):
    """Else a kernel of an older normkit would be taken for one of this."""
    package = compiled.__name__.removesuffix("compiled")
    reached, open_ = set(), {sys.modules[kernel.__module__] for kernel in kernels.functions.values()}
    while open_:
        module = open_.pop()
        reached.add(module.__name__)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            named = {base, *(f"{base}.{alias.name}" for alias in node.names)}
            open_ |= {sys.modules[name] for name in named if name.startswith(package) and name in sys.modules}
        open_ = {found for found in open_ if found.__name__ not in reached and not hasattr(found, "__path__")}
    assert {package + source for source in kernels.sources} == reached


def test_a_kernel_that_numba_cannot_rebuild_is_compiled(folders, monkeypatch):
    load()

    def refuse(*_):
        raise RuntimeError("of another make")

    monkeypatch.setattr(kernel_cache.CompileResult, "_rebuild", refuse)
    assert load().cache_hits == 0


def test_the_revision_is_known_where_the_source_was_left_out(monkeypatch):
    assert compiled._source(compiled.__name__).startswith(b'"""')

    def absent(self, path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(type(compiled.__spec__.loader), "get_data", absent)
    code = compiled._kernel.__wrapped__.__code__
    monkeypatch.setattr(type(compiled.__spec__.loader), "get_code", lambda self, name: code)
    assert compiled._source(compiled.__name__)


def refuse_under(monkeypatch, folder: Path, step: str, number: int) -> None:
    """Let one step of writing fail under a folder, as a full disk or one that may not be written does."""
    error = OSError(number, os.strerror(number))

    def under(path) -> bool:
        return isinstance(path, str) and Path(path).is_relative_to(folder)

    def fails_for_path(function):
        def call(path, *arguments, **settings):
            if under(path):
                raise error
            return function(path, *arguments, **settings)

        return call

    real_open, real_fdopen = os.open, os.fdopen
    opened: set[int] = set()

    def noting(path, *arguments, **settings):
        found = real_open(path, *arguments, **settings)
        (opened.add if under(path) else opened.discard)(found)
        return found

    class Full:
        """A file whose disk takes nothing."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            raise error

    def fdopen(number, *arguments, **settings):
        file = real_fdopen(number, *arguments, **settings)
        return Full(file) if number in opened else file

    if step == "write":
        monkeypatch.setattr(os, "open", noting)
        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, step, fails_for_path(getattr(os, step)))


STEPS = [
    ("makedirs", errno.EROFS),
    ("makedirs", errno.ENOSPC),
    ("open", errno.EACCES),
    ("open", errno.EDQUOT),
    ("write", errno.ENOSPC),
    ("replace", errno.ENOSPC),
]


@pytest.mark.parametrize(("step", "number"), STEPS, ids=[f"{step}-{errno.errorcode[code]}" for step, code in STEPS])
def test_the_named_folder_that_takes_nothing_is_told_once(asked, folders, monkeypatch, step, number):
    refuse_under(monkeypatch, asked, step, number)
    with pytest.warns(UserWarning, match=rf"kept in {asked}\S* \({os.strerror(number)}\).*NUMBA_CACHE_DIR"):
        load()
    assert load().cache_hits == 1
    load(("given", "float64", None, False))  # a second warning would be an error
    assert not kept(asked)
    assert len(kept(folders / "package")) == 2


@pytest.mark.parametrize(("step", "number"), STEPS, ids=[f"{step}-{errno.errorcode[code]}" for step, code in STEPS])
def test_a_package_and_a_home_that_take_nothing_leave_the_temporary_folder(folders, monkeypatch, step, number):
    for name in ("package", "home"):
        refuse_under(monkeypatch, folders / name, step, number)
    with pytest.warns(UserWarning, match=f"kept in {folders / 'temporary'}.*NUMBA_CACHE_DIR"):
        load()
    assert load().cache_hits == 1
    (file,) = kept(folders)
    assert file.parent.parent == folders / "temporary"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_home_is_used_without_a_word_where_the_package_cannot_be_written(folders, monkeypatch):
    refuse_under(monkeypatch, folders / "package", "makedirs", errno.EROFS)
    load()
    assert len(kept(folders / "home")) == 1


@pytest.mark.parametrize("step", ["open", "write"])
def test_where_nothing_can_be_written_kernels_serve_the_process(folders, monkeypatch, step):
    refuse_under(monkeypatch, folders, step, errno.ENOSPC)
    with pytest.warns(UserWarning, match="compiled anew in every process.*NUMBA_CACHE_DIR"):
        check_forward(monkeypatch)
    load()
    assert not kept(folders)


def test_without_any_folder_for_temporary_files_kernels_serve_the_process(asked, folders, monkeypatch):
    asked.write_text("a file")
    refuse_under(monkeypatch, folders, "makedirs", errno.EACCES)

    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.warns(UserWarning, match="compiled anew in every process"):
        load()


def test_a_warning_made_an_error_is_raised_once_and_leaves_the_next_call_whole(folders, monkeypatch):
    refuse_under(monkeypatch, folders, "open", errno.ENOSPC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            load()
        load()


def test_a_user_without_a_home_gets_no_folder_named_after_it(folders, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refuse_under(monkeypatch, folders / "package", "makedirs", errno.EROFS)
    with pytest.warns(UserWarning, match="temporary"):
        load()
    assert not (folders / "~").exists()


def test_a_folder_under_which_the_process_stands_may_be_gone(folders, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", "relative")
    gone = folders / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        load()
    monkeypatch.chdir(folders)


def never_unpickled(monkeypatch) -> None:
    def forbidden(content):
        raise AssertionError("what another user may have written was unpickled")

    monkeypatch.setattr(kernel_cache.pickle, "loads", forbidden)


@pytest.mark.parametrize("which", ["folder", "file"])
@pytest.mark.skipif(not AS_ROOT, reason="only root gives files away")
def test_what_another_user_wrote_is_not_read(asked, monkeypatch, which):
    load()
    (file,) = kept(asked)
    os.chown(file.parent if which == "folder" else file, 54321, 54321)
    never_unpickled(monkeypatch)
    if which == "file":  # this user's folder: the file is replaced by one of its own
        assert load().cache_hits == 0
        assert file.stat().st_uid == 0
        return
    with pytest.warns(UserWarning, match=r"belongs to another user, number 54321.*NUMBA_CACHE_DIR"):
        assert load().cache_hits == 0
    assert file.exists()


@pytest.mark.parametrize("which", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o002, 0o020])
def test_what_other_users_may_write_is_not_read(asked, monkeypatch, which, mode):
    load()
    (file,) = kept(asked)
    path = file.parent if which == "folder" else file
    path.chmod(path.stat().st_mode | mode)
    monkeypatch.setattr(os, "getegid", lambda: path.stat().st_gid + 1)
    never_unpickled(monkeypatch)
    if which == "file":
        assert load().cache_hits == 0
        assert not file.stat().st_mode & mode
        return
    with pytest.warns(UserWarning, match=r"other users may write.*NUMBA_CACHE_DIR"):
        assert load().cache_hits == 0


def test_a_folder_that_the_users_own_group_may_write_is_read(asked):
    load()
    (file,) = kept(asked)
    file.parent.chmod(0o775)
    assert load().cache_hits == 1


def test_the_administrators_kernels_are_read_where_they_cannot_be_written(asked, monkeypatch):
    load()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    if owner != 0:
        never_unpickled(monkeypatch)
        with pytest.warns(UserWarning, match="another user"):
            assert load().cache_hits == 0
        return
    assert load().cache_hits == 1


@pytest.mark.parametrize("trap", ["link", "open to read", "file"])
def test_a_private_folder_that_another_user_prepared_is_left_alone(folders, monkeypatch, trap):
    for name in ("package", "home"):
        refuse_under(monkeypatch, folders / name, "makedirs", errno.EROFS)
    private = Path(kernel_cache.places()[-1].folder)
    if trap == "link":
        (folders / "theirs").mkdir(mode=0o700)
        private.symlink_to(folders / "theirs")
    elif trap == "file":
        private.write_text("")
    else:
        private.mkdir(mode=0o755)
    with pytest.warns(UserWarning, match="compiled anew in every process"):
        load()
    assert not kept(folders / "theirs")


def test_a_pipe_in_a_files_place_stops_nobody(folders):
    load()
    (file,) = kept(folders)
    file.unlink()
    os.mkfifo(file)
    assert load().cache_hits == 0
    assert load().cache_hits == 1


def begin(program: str, folders: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process on this tree that looks for kernels where this one does."""
    program = "\n".join(
        (
            "import pathlib",
            "from normkit.kernels.numba import kernel_cache",
            "from normkit.kernels.numba.channels.kernels import KERNELS",
            f"kernel_cache._PACKAGE = pathlib.Path({str(folders / 'package')!r})",
            program,
        )
    )
    given = {**os.environ, "PYTHONPATH": str(Path(normkit.__file__).parents[1]), **environment}
    return subprocess.Popen([*before, sys.executable, "-c", program], stdout=-1, stderr=-1, text=True, env=given)


def test_a_kill_while_writing_leaves_nothing_that_is_read(asked, folders):
    killing = f"""
import os, signal
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
KERNELS.address(*{SMALL})
"""
    killed = begin(killing, folders, NUMBA_CACHE_DIR=str(asked))
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert len(kept(asked)) == 1  # what it was about to rename
    assert load().cache_hits == 0
    assert load().cache_hits == 1


def test_two_processes_that_compile_at_once_keep_both_kernels(asked, folders):
    # Each waits for the other before it compiles: the forms of one function that Numba's own index would mix up.
    compiling = """
pathlib.Path({!r}).touch()
import time
while not pathlib.Path({!r}).exists(): time.sleep(0.001)
KERNELS.address("given", {!r}, None, False)
"""
    forms, flags = ("float32", "float64"), [str(folders / name) for name in ("one", "two")]
    both = [
        begin(compiling.format(here, other, form), folders, NUMBA_CACHE_DIR=str(asked))
        for here, other, form in zip(flags, flags[::-1], forms, strict=True)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert len(kept(asked)) == 2
    for form in forms:
        found = load(("given", form, None, False))
        assert found.cache_hits == 1
        assert form in str(found._sig)


@pytest.mark.skipif(not AS_ROOT or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_where_only_the_temporary_folder_may_be_written_numbers_are_right(folders):
    checking = """
import torch, normkit
x = torch.randn(3, 2, 5, 7, dtype=torch.float64, requires_grad=True)
dy = torch.randn_like(x)
given = torch.autograd.grad(normkit.BatchNorm2d(2).double()(x), x, dy)[0]
centred = x - x.mean((0, 2, 3), keepdim=True)
y = centred / ((centred ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
torch.testing.assert_close(given, torch.autograd.grad(y, x, dy)[0])
"""
    for name in ("package", "home"):
        (folders / name).chmod(0o555)
    bound = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
    process = begin(checking, folders, *bound, TMPDIR=str(folders / "temporary"), NUMBA_CACHE_DIR="")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("NUMBA_CACHE_DIR") == 1
    (folder,) = (folders / "temporary").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {file.parent for file in kept(folders)} == {folder}
