"""The broadcaster of the older implementation, with the settings of the interoperability tests:

    older_broadcaster.py tests/interop/reference_broadcaster.py --directory D --secrets FILE

Only its application comes from that script. Its server would be without uvloop, and would write a
line of log per request, which the tests want and which would be counted against it here.
"""

from __future__ import annotations

import logging
import runpy
import sys

import asgi

del sys.argv[0]
script = runpy.run_path(sys.argv[0])
logging.disable(logging.INFO)
listener, port = asgi.listen()
asgi.serve(script["make_app"](script["parse_arguments"](), f"http://127.0.0.1:{port}"), listener)
