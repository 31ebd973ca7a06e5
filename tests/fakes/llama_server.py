"""A stand-in for llama-server in router mode, started as `python -I -S llama_server.py BEHAVIOUR PROGRAM ARGUMENT...`.

BEHAVIOUR is a JSON document (`server/behaviour.py` says what it may hold), PROGRAM the path under which llama-server
was started, usually a wrapper that `fakes.FakeLlamaServer` wrote. It needs nothing beyond the standard library and
imports little of that, because the tests start it hundreds of times. Everything else is in the package beside it, which
Python keeps compiled.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from server.main import main  # noqa: E402 (an isolated Python does not look beside its script)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
