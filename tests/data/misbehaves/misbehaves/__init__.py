"""A third party's package that does everything wrong. Tests say what, where and until when."""

import threading

where = ""  # "admit", "TextFilter.push", ...
how = ""  # "raise", "hang", "lie"
released = threading.Event()  # set it, and whatever hangs comes back


def misbehave():
    if how == "raise":
        raise RuntimeError("broken on purpose")
    while how == "hang" and not released.wait(0.01):
        pass
    return object()  # of no type that anybody expects
