"""A proxy before an S3 server that does what networks and busy servers do, as set from moment to moment.

    with FaultProxy("127.0.0.1", port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.error_rate = 0.3
        ...
        assert proxy.errors > 0                      # else the test has shown nothing

It reads HTTP/1.1 as far as it must to tell one request from the next; the bytes pass unchanged.
"""

import asyncio
import random
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from typing import Self

CHUNK = 1 << 16
SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)


class FaultProxy:
    """Set the faults at any time from any thread; they hold for what passes from then on."""

    def __init__(self, upstream_host: str, upstream_port: int, host: str = "127.0.0.1"):
        self.upstream, self.host = (upstream_host, upstream_port), host
        self.latency = 0.0  # seconds before each request is passed on
        self.bytes_per_second = 0  # of each connection and direction; 0: unlimited
        self.error_rate = 0.0  # share of requests that are answered 503 SlowDown and not passed on
        self.reset_rate = 0.0  # share of requests cut by a reset, half of them in the request, half in the answer
        self.stall = False  # nothing passes, connections stay open
        self.connections = self.requests = self.errors = self.resets = self.bytes_up = self.bytes_down = 0
        self._down = False
        self._writers: set[StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def down(self) -> bool:
        """True: connections are refused, and those that were open are reset."""
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        if down != self._down:
            self._call(self._close() if down else self._listen())
            self._down = down

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)

    async def _end(self) -> None:
        await self._close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: StreamReader, client: StreamWriter) -> None:
        self.connections += 1
        self._writers.add(client)
        try:
            upstream_reader, upstream = await asyncio.open_connection(*self.upstream)
        except (OSError, asyncio.CancelledError):
            self._writers.discard(client)
            return _reset(client)
        self._writers.add(upstream)
        exchange = _Exchange(self, reader, client, upstream_reader, upstream)
        directions = [asyncio.ensure_future(exchange.requests()), asyncio.ensure_future(exchange.answers())]
        with suppress(asyncio.CancelledError):  # by `_end`
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        for writer in (client, upstream):
            self._writers.discard(writer)
            writer.close()

    async def _pace(self, size: int) -> None:
        while self.stall:
            await asyncio.sleep(0.02)
        if self.bytes_per_second:
            await asyncio.sleep(size / self.bytes_per_second)


class _Exchange:
    """One connection: its requests upwards, one after the other, and the answers downwards as they come."""

    def __init__(
        self,
        proxy: FaultProxy,
        reader: StreamReader,
        client: StreamWriter,
        answers: StreamReader,
        upstream: StreamWriter,
    ):
        self.proxy, self.reader, self.client, self.answer_reader, self.upstream = (
            proxy,
            reader,
            client,
            answers,
            upstream,
        )
        self.cut_answer = False

    async def requests(self) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while await self._request(await self.reader.readuntil(b"\r\n\r\n")):
                pass

    async def answers(self) -> None:
        with suppress(OSError):
            while data := await self.answer_reader.read(CHUNK):
                await self.proxy._pace(len(data))
                if self.cut_answer:
                    return self._reset(data)
                self.proxy.bytes_down += len(data)
                self.client.write(data)
                await self.client.drain()

    async def _request(self, head: bytes) -> bool:
        """Pass one request on; false when the connection is over."""
        proxy = self.proxy
        proxy.requests += 1
        await asyncio.sleep(proxy.latency)
        if random.random() < proxy.error_rate:
            return await self._refuse(head)
        cut = random.random() < proxy.reset_rate and random.choice(("request", "answer"))
        self.cut_answer = cut == "answer"
        await self._up(head)
        async for data in self._body(head):
            if cut == "request":
                break
            await self._up(data)
        if cut == "request":
            self._reset()
        return cut != "request"

    async def _up(self, data: bytes) -> None:
        await self.proxy._pace(len(data))
        self.proxy.bytes_up += len(data)
        self.upstream.write(data)
        await self.upstream.drain()

    async def _refuse(self, head: bytes) -> bool:
        """503, as S3 says it. A client that waits for '100 Continue' sends no body, so its connection ends here."""
        self.proxy.errors += 1
        waits = b"\r\nexpect:" in head.lower()
        if not waits:
            async for _ in self._body(head):
                pass
        lines = ["HTTP/1.1 503 Slow Down", "Content-Type: application/xml", f"Content-Length: {len(SLOW_DOWN)}"]
        lines += ["Connection: close"] if waits else []
        body = b"" if head.startswith(b"HEAD ") else SLOW_DOWN
        self.client.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.client.drain()
        return not waits

    async def _body(self, head: bytes):
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            size = -1
            while size:
                line = await self.reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                yield line + await self.reader.readexactly(size + 2)
        left = int(fields.get(b"content-length", 0))
        while left:
            data = await self.reader.read(min(left, CHUNK))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(data)
            yield data

    def _reset(self, last_words: bytes = b"") -> None:
        self.proxy.resets += 1
        self.client.write(last_words[: len(last_words) // 2])
        _reset(self.upstream)
        _reset(self.client)


def _reset(writer: StreamWriter) -> None:
    """Close so that the other side sees ECONNRESET, not an orderly end."""
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
