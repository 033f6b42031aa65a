"""Processes that cannot find each other say so at once."""

import pytest

from funmatch.errors import InputError
from funmatch.runtime import distributed


def test_port_zero_is_refused_instead_of_waited_for(monkeypatch):
    words = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in words.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="--master-port 0; pass --standalone"), distributed.process_group("cpu"):
        pass
