"""A publisher and a subscriber whose spans are in one trace, printed instead of sent."""

import asyncio

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

# a real program has OTLPSpanExporter() in place of this exporter
exporter = ConsoleSpanExporter(formatter=lambda span: f"{span.context.trace_id:032x} {span.name}\n")
provider = TracerProvider(resource=Resource({"service.name": "shop"}))
provider.add_span_processor(BatchSpanProcessor(exporter))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("shop")

config = make_http_pub_sub_config(
    bind={"type": "uvicorn", "host": "127.0.0.1", "port": 3002},
    host="http://127.0.0.1:3002",
    broadcasters=[{"host": "http://127.0.0.1:3003"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
    tracing=True,
)


async def main() -> None:
    async with (
        HttpPubSubClient(config) as client,
        client.subscribe_exact(b"orders/42") as subscription,
    ):
        messages = await subscription.messages()
        with tracer.start_as_current_span("pay"):
            await client.notify(topic=b"orders/42", data=b"paid")
        message = await anext(messages)
        # until the next message, this task is inside the span of this one
        with tracer.start_as_current_span("ship"):
            print(f"Shipping what was {message.data.read().decode()}")
        print(f"Hand this on to other programs: {message.trace_context['traceparent']}")


if __name__ == "__main__":
    asyncio.run(main())
