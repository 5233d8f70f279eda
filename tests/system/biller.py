"""An upstream that bills: it answers well or badly by chance, and knows what each of its answers cost.

Its bills never exceed what a broker must have reserved: the prompt is counted low, and the answer keeps to its cap.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.money import NANO, PRICE, price_list
from tests.responses import completed, delta, event, failed, in_responses_names
from tests.scripted import chunk
from tests.system.cluster import marker_of

if TYPE_CHECKING:
    from random import Random

    from tests.scripted import Call, ScriptedUpstream

MAX_TOKENS = 100
"""What a session of the run asks for."""

PROMPT = 10
"""Tokens billed for every prompt."""

PER_CHUNK = 5
"""Tokens of a chunk, which has 20 bytes."""

AT_ONCE = 0.25
"""Seconds from the head of an answer within which whoever hangs up may not have read it."""

REFUSALS = (401, 402, 404, 429, 503)
ENDINGS = (
    "usage",
    "usage",
    "usage",
    "silent",
    "cut",
    "reset",
    "error",
    "late error",
    "hang",
    "refuse",
)
"""How answers end: with their usage; without it, with or without a record to be fetched; and with faults."""


@dataclass
class Bill:
    """One call and its price.

    Attributes:
        generation: its name.
        tokens: of prompt and answer; 0 for what was refused.
        told: the answer had its usage.
        recorded: there is a record of it.
        named: the broker got the generation's id.
        began_at, over_at: when, by the loop's clock; nothing is added any more.
        call: the request, once its answer was begun.
        opened_at: when that was.
        closed: this side closed the connection.
    """

    generation: str
    tokens: int = 0
    told: bool = False
    recorded: bool = False
    named: bool = False
    began_at: float = 0.0
    over_at: float = float("inf")
    call: Call | None = None
    opened_at: float = 0.0
    closed: bool = False

    @property
    def left_at_once(self) -> bool:
        """The broker hung up as the answer began, for a cancel, and so may not have read even its head."""
        call = self.call
        if call is None or self.closed or not call.gone.is_set():
            return False
        return call.gone_at < self.opened_at + AT_ONCE

    @property
    def cost(self) -> int:
        """Nano-USD."""
        return self.tokens * PRICE


@dataclass
class Biller:
    """Answers every call of a scripted upstream.

    Attributes:
        bills: by prompt, of every call that was ever made.
    """

    scripted: ScriptedUpstream
    random: Random
    bills: dict[str, list[Bill]] = field(default_factory=lambda: defaultdict(list))
    _playing: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scripted.models = price_list()
        self.scripted.generations["none"] = None  # there are records
        self.scripted.replies = [self._answer]

    async def close(self) -> None:
        """Stop answering."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)

    def _answer(self, call: Call) -> None:
        bills = self.bills[marker_of(call)]
        bill = Bill(f"gen-{id(bills)}-{len(bills)}", began_at=asyncio.get_running_loop().time())
        bills.append(bill)
        ending = self.random.choice(ENDINGS)
        if ending == "refuse":
            status = self.random.choice(REFUSALS)
            call.reply(status, {"error": {"code": status, "message": "No."}}, {"Retry-After": "0"})
            return
        task = asyncio.create_task(self._play(call, bill, ending))
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)

    async def _play(self, call: Call, bill: Bill, ending: str) -> None:
        self.scripted.generations[bill.generation] = None
        bill.tokens = PROMPT
        chunks, pause = self.random.randrange(MAX_TOKENS // PER_CHUNK + 1), self.random.uniform(0, 0.15)
        bill.call, bill.opened_at = call, asyncio.get_running_loop().time()
        if self.random.random() < 0.7:
            call.open(x_generation_id=bill.generation)
            bill.named = True
        else:
            call.open()
        in_responses = "input" in call.body
        if in_responses:
            self._send(call, bill, event("response.created", response={"id": bill.generation}))
        for _ in range(chunks):
            if await self._gone(call, pause):
                break
            bill.tokens += PER_CHUNK
            self._send(call, bill, delta("x" * 20) if in_responses else chunk("x" * 20))
        else:
            await (self._end_response if in_responses else self._end)(call, bill, ending)
        bill.over_at = asyncio.get_running_loop().time()
        # Each is recorded: else its estimate would keep its reservation for ten minutes, and pages wait for that.
        bill.recorded = True
        self.scripted.generations[bill.generation] = {
            "total_cost": bill.cost / NANO,
            "native_tokens_prompt": PROMPT,
            "native_tokens_completion": bill.tokens - PROMPT,
        }

    async def _end(self, call: Call, bill: Bill, ending: str) -> None:
        if ending in ("usage", "late error"):
            bill.told = True
            self._send(call, bill, self._usage(bill))
        if ending in ("usage", "silent"):
            self._send(call, bill, chunk(finish="stop"))
            call.done()
        elif ending in ("error", "late error"):
            bill.closed = True
            call.event(json.dumps({"error": {"code": 502, "message": "It broke."}}).encode())
            call.close()
        else:
            await self._break_off(call, bill, ending)

    async def _end_response(self, call: Call, bill: Bill, ending: str) -> None:
        """End in the Responses dialect, whose usage comes with the end."""
        bill.told = ending in ("usage", "late error")
        usage = in_responses_names(self._usage(bill)["usage"]) if bill.told else None
        if ending in ("usage", "silent"):
            self._send(call, bill, completed(usage=usage))
            call.done()
        elif ending in ("error", "late error"):
            bill.closed = True
            self._send(call, bill, failed({"code": "server_error", "message": "It broke."}, usage=usage))
            call.close()
        else:
            await self._break_off(call, bill, ending)

    @staticmethod
    async def _break_off(call: Call, bill: Bill, ending: str) -> None:
        if ending == "cut":
            bill.closed = True
            call.close()
        elif ending == "reset":
            bill.closed = True
            call.reset()
        else:
            await call.gone.wait()

    def _usage(self, bill: Bill) -> dict[str, Any]:
        usage = {
            "prompt_tokens": PROMPT,
            "completion_tokens": bill.tokens - PROMPT,
            "total_tokens": bill.tokens,
        }
        return chunk(choices=[], usage={**usage, "cost": bill.cost / NANO})

    @staticmethod
    def _send(call: Call, bill: Bill, data: dict[str, Any]) -> None:
        if "choices" in data:
            data = {**data, "id": bill.generation}
        elif "response" in data:
            data = {**data, "response": {**data["response"], "id": bill.generation}}
        call.event(json.dumps(data).encode())
        bill.named = True

    @staticmethod
    async def _gone(call: Call, within: float) -> bool:
        """Return True if the reader leaves before the end of the pause."""
        try:
            async with asyncio.timeout(within):
                await call.gone.wait()
        except TimeoutError:
            return False
        return True
