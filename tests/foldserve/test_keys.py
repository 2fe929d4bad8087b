"""`foldserve keys` makes a key that a service takes, and a removed one opens nothing."""

import pytest

from foldserve.cli import main
from service.errors import NotAuthenticated
from service.security import KeyRing


def test_a_made_key_is_printed_once_works_and_stops_working_when_removed(tmp_path, capsys):
    where = ["--api-keys-file", str(tmp_path / "keys")]
    assert main(["keys", "add", "ann", *where]) == 0
    assert main(["keys", "add", "root", "--role", "admin", *where]) == 0
    ann, root = capsys.readouterr().out.splitlines()
    ring = KeyRing(tmp_path / "keys")

    ring.check("predict", ann)
    ring.check("admin", root)
    assert main(["keys", "list", *where]) == 0
    assert capsys.readouterr().out.split() == ["predict", "ann", "admin", "root"]
    assert main(["keys", "remove", "ann", *where]) == 0

    with pytest.raises(NotAuthenticated):
        ring.check("predict", ann)


@pytest.mark.parametrize(
    "arguments, status, told",
    [
        (["add", "a:b"], 2, "expected 1 to 64"),
        (["remove", "nobody"], 1, "no key named nobody"),
        (["add", "ann"], 2, "remove that one first"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, capsys, arguments, status, told):
    where = ["--api-keys-file", str(tmp_path / "keys")]
    main(["keys", "add", "ann", *where])

    assert main(["keys", *arguments, *where]) == status
    assert told in capsys.readouterr().err


def test_without_a_file_it_asks_which(capsys):
    assert main(["keys", "list"]) == 2
    assert "FOLDSERVE_API_KEYS_FILE" in capsys.readouterr().err
