"""A broadcaster from Python, as `lonelypss serve` runs it from a shell."""

import uvicorn

from lonelypss.app import create_app
from lonelypss.config import BroadcasterConfig
from lonelypss.secrets import load_auth

config = BroadcasterConfig(
    db="sqlite:///lonelypss.db",
    auth=load_auth("broadcaster-secrets.json", db="sqlite:///lonelypss.db"),
    missed_max_retries=20,
)
app = create_app(config)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=3003, access_log=False)
