"""Tables of what is refused, and an object that no file may bring to life."""

import os

import pytest


def refuses(cases, by=lambda function: function(), error=None):
    """Return a test of each case: what ``by`` is given, the error if it is not one for all, its message."""

    @pytest.mark.parametrize("case", cases, ids=lambda case: case[-1])
    def test(case):
        *given, message = case
        with pytest.raises(error or given.pop(), match=message):
            by(*given)

    return test


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
