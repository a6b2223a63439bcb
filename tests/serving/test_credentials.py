"""What a key may be, wherever it comes from."""

from __future__ import annotations

import pytest

from loraflow.errors import LoraflowError
from loraflow.serving.config import ServerConfig
from loraflow.serving.credentials import read_keys


@pytest.mark.parametrize("name", ["api_keys", "admin_keys"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("",), r"Key 1 of 1 \(`{name}=\.\.\.`\) is empty, as an unset variable is, and would let everybody in"),
        (("fine", " \t\n"), r"Key 2 of 2 \(`{name}=\.\.\.`\) is empty"),
        (("schlüssel7",), "has characters that not every client can send in a header. Use visible ASCII characters"),
        (("s3\tcret",), "has characters that not every client can send"),
        (("line\r\nX-Other: 1",), "has characters that not every client can send"),
        (("s3cret ",), "has blanks at its ends, which HTTP takes off, so that no request could bring it"),
        ("secret", "`{name}` is one text. Give a list of keys, even of one."),
    ],
)
def test_keys_that_nobody_or_everybody_could_bring(name, keys, message, tmp_path):
    with pytest.raises(LoraflowError, match=message.replace("{name}", name)) as error:
        ServerConfig(**{name: keys}, **({"load_from": (tmp_path,)} if name == "admin_keys" else {}))
    for key in [keys] if isinstance(keys, str) else keys:
        assert not key.strip() or key.strip() not in str(error.value)


def test_no_key_is_both(tmp_path):
    with pytest.raises(LoraflowError, match=r"A key is among both `api_keys=\.\.\.` and `admin_keys=\.\.\.`") as error:
        ServerConfig(api_keys=("one", "boss7"), admin_keys=("boss7",), load_from=(tmp_path,))
    assert "boss7" not in str(error.value)


def test_keys_are_not_shown(tmp_path):
    config = ServerConfig(api_keys=("user7",), admin_keys=("boss7",), load_from=(tmp_path,))
    assert "user7" not in repr(config)
    assert "boss7" not in repr(config)


def test_a_file_has_one_key_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# of the team\r\nfirst\r\n\r\n  second key  \r\n#third\r\nfo#urth")
    assert read_keys("api_key_file", file) == ("first", "second key", "fo#urth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"The file of `api_key_file=\.\.\.` \('.*keys'\) cannot be read: No such file or directory\. ",
        ),
        (b"\xff\xfe", "cannot be read: it is no UTF-8 text. Give a text file with one key a line"),
        (b"", "has no key in it. Write one key a line into it"),
        (b"# nothing\n\n", "has no key in it"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(LoraflowError, match=message):
        read_keys("api_key_file", tmp_path / "keys")
