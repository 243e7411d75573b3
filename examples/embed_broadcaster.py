"""A broadcaster inside an application that has routes of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from lonelypss.app import Broadcaster
from lonelypss.config import BroadcasterConfig
from lonelypss.secrets import load_auth

broadcaster = Broadcaster(
    BroadcasterConfig(
        db="sqlite:///lonelypss.db",
        auth=load_auth("broadcaster-secrets.json", db="sqlite:///lonelypss.db"),
    )
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # the broadcaster works while it is entered; what the application needs goes here, too
    async with broadcaster:
        yield


app = FastAPI(lifespan=lifespan)
# subscribers and publishers use http://127.0.0.1:3003/pubsub as the broadcaster's host
app.include_router(broadcaster.router, prefix="/pubsub")


@app.get("/")
async def index() -> dict[str, int]:
    return await broadcaster.store.counts()


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=3003, access_log=False)
