"""A stand-in for llama-server in router mode.

Started as `python -I -S llama_server.py BEHAVIOUR PROGRAM ARGUMENT...`: BEHAVIOUR is a JSON document
(`server/behaviour.py` says what it may hold), PROGRAM the path under which llama-server was started, which is a
wrapper that `fakes.FakeLlamaServer` wrote. FAKE_LLAMA in the environment names another BEHAVIOUR.

It needs nothing beyond the standard library and imports little of that, because the tests start it hundreds of times.
All else is in the package beside it, which Python keeps compiled.
"""

import sys

# An isolated Python does not look for modules beside its script.
sys.path.insert(0, __file__.rpartition("/")[0])

from server.main import main

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
