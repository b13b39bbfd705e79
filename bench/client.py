"""The one client of all systems: a closed loop of keep-alive connections, one text a request.

Answers are kept as they came and read after the window, so that reading costs every system nothing.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field

from bench.systems import ASKS
from core.tables import LABEL, SCORE, TEXT

TIMEOUT_S = 120  # of one request: a slower answer is none


@dataclass
class Window:
    """What came back: and how long it took."""

    seconds: float = 0
    client_cpu_s: float = 0
    answers: list = field(default_factory=list)  # (text's number, latency in s, status, answer)


class HttpConnection:
    """One keep-alive connection that posts requests, whole as they go over the wire."""

    def __init__(self, port, requests):
        self.port, self.requests, self.writer = port, requests, None

    async def open(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, number):
        if self.writer is None:
            await self.open()
        self.writer.write(self.requests[number])
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await self.reader.readexactly(length)
        if b"connection: close" in head:
            await self.close()
        return int(head.split(b" ", 2)[1]), answer

    async def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None


class GrpcConnection:
    """The same over gRPC to Triton; an answer is (label, score)."""

    def __init__(self, port, service, requests):
        import tritonclient.grpc.aio as grpc

        self.url, self.service, self.requests, self.grpc, self.client = (
            f"127.0.0.1:{port}",
            service,
            requests,
            grpc,
            None,
        )
        self.outputs = [grpc.InferRequestedOutput(name) for name in (LABEL, SCORE)]

    async def open(self):
        self.client = self.grpc.InferenceServerClient(self.url)
        await self.client.is_server_live()

    async def ask(self, number):
        if self.client is None:
            await self.open()
        found = await self.client.infer(self.service, self.requests[number], outputs=self.outputs)
        return 200, (found.as_numpy(LABEL).item().decode(), float(found.as_numpy(SCORE).item()))

    async def close(self):
        client, self.client = self.client, None
        if client:
            await client.close()


def make_requests(system, service, texts):
    """What is sent for each text, made once: a window only sends it."""
    if system.protocol == "grpc":
        import tritonclient.grpc as grpc

        from serving.server import make_inputs, text_tensor

        return [make_inputs(grpc, text_tensor([text], (TEXT,))) for text in texts]
    ask = ASKS[system.ask]
    head = f"POST {ask.path.format(service=service)} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    bodies = [json.dumps(ask.body(text)).encode() for text in texts]
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def connect(system, ports, service, requests):
    """A connection that is not open yet."""
    if system.protocol == "grpc":
        return GrpcConnection(ports["grpc"], service, requests)
    return HttpConnection(ports["http"], requests)


def read_answer(system, status, answer):
    """(label, score) of an answer; None where it is none."""
    if status != 200:
        return None
    try:
        label, score = answer if system.protocol == "grpc" else ASKS[system.ask].read(json.loads(answer))
        return str(label), float(score)
    except (ValueError, KeyError, IndexError, TypeError):
        return None


async def ask_window(connections, start, count):
    """`count` requests, as many under way as there are connections: the texts from number `start` on, round and round."""
    window, positions = Window(), iter(range(start, start + count))
    await asyncio.gather(*(connection.open() for connection in connections), return_exceptions=True)

    async def work(connection):
        for position in positions:
            number, before = position % len(connection.requests), time.perf_counter()
            try:
                status, answer = await asyncio.wait_for(connection.ask(number), TIMEOUT_S)
            except Exception as error:  # every library has its own; whatever it is, there was no answer
                status, answer = 0, str(error)
                await connection.close()
            window.answers.append((number, time.perf_counter() - before, status, answer))

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(work, connections))
    window.seconds, window.client_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    await asyncio.gather(*(connection.close() for connection in connections), return_exceptions=True)
    return window


def run_window(system, ports, service, requests, concurrency, start, count):
    """One window, in an event loop of its own."""

    async def run():
        connections = [connect(system, ports, service, requests) for _ in range(concurrency)]
        return await ask_window(connections, start, count)

    return asyncio.run(run())
