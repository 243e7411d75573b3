"""Two clients behind one listener, told apart by the fragment of their host."""

import asyncio

import uvicorn
from fastapi import APIRouter, FastAPI

from lonelypsc.client import PubSubClient
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient


def make_client(app: FastAPI, name: str) -> PubSubClient:
    async def mount(router: APIRouter) -> None:
        app.include_router(router)

    config = make_http_pub_sub_config(
        bind={"type": "manual", "callback": mount},
        host=f"http://127.0.0.1:3002#{name}",
        broadcasters=[{"host": "http://127.0.0.1:3003"}],
        auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
    )
    return HttpPubSubClient(config)


async def first(client: PubSubClient, topic: bytes) -> bytes:
    async with client.subscribe_exact(topic) as subscription:
        async for message in await subscription.messages():
            return message.data.read()
    return b""


async def main() -> None:
    app = FastAPI()
    server = uvicorn.Server(uvicorn.Config(app, port=3002, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    async with make_client(app, "one") as one, make_client(app, "two") as two:
        print(await asyncio.gather(first(one, b"foo/one"), first(two, b"foo/two")))
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(main())
