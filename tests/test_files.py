import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitembed import files
from vitembed.errors import VitembedError
from vitembed.files import atomic_path, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("data", "stored"), [(b"\x00\xff", b"\x00\xff"), ("grün\n", "grün\n".encode())])
def test_bytes_and_text_are_stored_as_they_are(tmp_path, data, stored):
    atomic_write(tmp_path / "a.bin", data)
    assert (tmp_path / "a.bin").read_bytes() == stored
    assert names(tmp_path) == ["a.bin"]


def test_a_string_path_replaces_the_old_content(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("a much longer old content")
    atomic_write(str(target), "new")
    assert target.read_text() == "new"


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def interrupted():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old"  # not visible before the end
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    code = (
        "import os, sys\nfrom vitembed.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n    t.write_text('half'); os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == 9
    assert target.read_text() == "old"


def test_the_temporary_path_is_a_sibling_with_the_same_suffix(tmp_path):
    with atomic_path(tmp_path / "curve.png") as temporary:
        assert temporary.exists()
        assert temporary.parent == tmp_path.resolve()
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".curve-")


def test_permissions_of_an_existing_file_are_kept(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    target.chmod(0o640)
    atomic_write(target, "new")
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    atomic_write(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(VitembedError, match=r"cannot write .*x/a\.json: there is no folder .*x; create it"):
        atomic_write(tmp_path / "x" / "a.json", "new")
    assert not (tmp_path / "x").exists()


def test_a_folder_as_target_is_one_clear_error(tmp_path):
    with pytest.raises(VitembedError, match="it is a folder"):
        atomic_write(tmp_path, "new")


@pytest.mark.parametrize("refused", ["touch", "replace"])
def test_a_refused_permission_is_one_clear_error(tmp_path, monkeypatch, refused):
    # The tests may run as root, whom permissions do not stop: the refusal is made up.
    target = tmp_path / "a.json"
    target.write_text("old")

    def refuse(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, refused, refuse)
    with pytest.raises(VitembedError, match=r"cannot write .*a\.json: Permission denied"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VitembedError, match=r"cannot write .*a\.json: No space left on device"):
        atomic_write(tmp_path / "a.json", "new")
    assert names(tmp_path) == []


def test_an_error_of_the_block_about_another_file_passes_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "a.json"):
        (tmp_path / "other").read_text()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("number", "harmless"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_without_folder_sync_still_works(tmp_path, monkeypatch, number, harmless):
    sync = files._sync

    def only_files(path, flags):
        if path.is_dir():
            raise OSError(number, os.strerror(number))
        sync(path, flags)

    monkeypatch.setattr(files, "_sync", only_files)
    if harmless:
        atomic_write(tmp_path / "a.json", "new")
    else:
        with pytest.raises(VitembedError, match="Input/output error"):
            atomic_write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
