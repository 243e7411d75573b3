"""A subscriber inside an application that listens already."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import APIRouter, FastAPI

from lonelypsc.client import PubSubClient
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

latest: dict[str, str] = {}


async def collect(client: PubSubClient) -> None:
    async with client.subscribe_glob("foo/*") as subscription:
        async for message in await subscription.messages():
            latest[message.topic.decode()] = message.data.read().decode()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async def mount(router: APIRouter) -> None:
        app.include_router(router, prefix="/pubsub")

    config = make_http_pub_sub_config(
        bind={"type": "manual", "callback": mount},
        # how broadcasters reach this application, prefix included
        host="http://127.0.0.1:3002/pubsub",
        broadcasters=[{"host": "http://127.0.0.1:3003"}],
        auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
    )
    async with HttpPubSubClient(config) as client:
        task = asyncio.create_task(collect(client))
        yield
        task.cancel()
        await asyncio.wait([task])


app = FastAPI(lifespan=lifespan)


@app.get("/latest")
async def get_latest() -> dict[str, str]:
    return latest


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=3002, access_log=False)
