"""A small server of OpenEnv's protocol: it echoes texts."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket
from starlette.websockets import WebSocketDisconnect

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
LENGTH = 5
"""Steps of an episode"""


class EchoServer:
    """An observation is the action, a reward its length, and `done` comes after LENGTH steps.

    The action "crash" ends the connection, "evict" the session, "wrong" gets an error, and "cut"
    truncates the episode.

    Args:
        schema: The reply of GET /schema.
        token: Required as a bearer token, where there is one.
        json: Observations are {"echo": TEXT, "steps": N} instead of texts.
    """

    def __init__(self, schema: Any = None, token: str = "", json: bool = False):
        self.schema = {"action": TEXT, "observation": TEXT} if schema is None else schema
        self.token, self.json = token, json
        self.messages: list[Any] = []
        """All that clients sent"""
        self.open = 0
        """Connections that are open"""
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, call: Any) -> Any:
            return await call(request) if self.allowed(request) else Response(status_code=401)

        @app.get("/schema")
        def schema_of() -> Any:
            return self.schema

        @app.get("/metadata")
        def metadata() -> Any:
            return {"name": "echo", "version": "7"}

        @app.websocket("/ws")
        async def connect(client: WebSocket) -> None:
            if not self.allowed(client):
                await client.close()
                return
            await client.accept()
            self.open += 1
            try:
                await self.converse(client)
            except WebSocketDisconnect:
                pass
            finally:
                self.open -= 1

        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options: dict[str, Any] = {"lifespan": "off", "log_level": "critical"}
        config = uvicorn.Config(app, ws="websockets-sansio", **options)
        self.server = uvicorn.Server(config)
        serving = self.server.serve(sockets=[listener])
        self.thread = threading.Thread(target=asyncio.run, args=(serving,))
        self.thread.start()

    def allowed(self, request: Any) -> bool:
        authorization = request.headers.get("Authorization", "")
        return not self.token or authorization == f"Bearer {self.token}"

    async def converse(self, client: WebSocket) -> None:
        steps = 0
        while True:
            message = await client.receive_json()
            self.messages.append(message)
            text, reward, kind = (
                f"seed {message.get('data', {}).get('seed')}",
                None,
                message["type"],
            )
            if kind == "close":
                return
            steps = steps + 1 if kind == "step" else 0
            if kind == "step":
                text = str(message["data"].get("text", message["data"]))
                reward = len(text)
            if text == "crash":
                await client.close()
                return
            if text == "evict":
                data: Any = {"message": "unused for long", "code": "SESSION_ERROR"}
                await client.send_json({"type": "error", "data": data})
                await client.close()
                return
            if text == "wrong":
                data = {"message": "no such\ncommand", "code": "VALIDATION_ERROR"}
                await client.send_json({"type": "error", "data": data})
                continue
            observation: Any = {"echo": text, "steps": steps} if self.json else {"text": text}
            observation |= {"commands": ["a", "b"], "metadata": {"success": text == "good"}}
            data = {"observation": observation, "reward": reward}
            data |= {"done": steps >= LENGTH or text == "cut"}
            data |= {"metadata": {"success": text == "good", "truncated": text == "cut"}}
            await client.send_json({"type": "observation", "data": data})

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
