"""`~` means the home folder wherever a path is written."""

from pathlib import Path

import pytest

from raco_fast.settings import paths
from raco_fast.settings.paths import expanded


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~") == tmp_path
    assert expanded("~/a b/c") == expanded(Path("~/a b/c")) == tmp_path / "a b" / "c"
    for plain in ("a/~/b", "./~", "/x/y", "a~", "$HOME/x"):
        assert expanded(plain) == Path(plain)
    monkeypatch.delenv("HOME")
    assert expanded("~").is_absolute()  # the password database knows


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "`data.path` must name a file or a folder, got an empty text"),
        ("a\0b", "`data.path` must have no NUL character"),
        ("a\ud800", "`data.path` must be UTF-8 text"),
        (
            "~no_such_user_here/x",
            "`data.path` begins with '~', got .*; write the whole path, set HOME",
        ),
    ],
)
def test_what_is_no_path(path, message):
    with pytest.raises(ValueError, match=message):
        expanded(path, "data.path")


def test_no_home_at_all(monkeypatch):
    monkeypatch.setattr(paths.os.path, "expanduser", lambda text: text)  # HOME unset, uid unknown
    with pytest.raises(ValueError, match="begins with '~', got '~/x', and that home folder is not"):
        expanded("~/x")
