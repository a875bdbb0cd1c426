"""Clients of every kind against `specmoe serve` for minutes: answers right, memory flat, how long people wait, what it costs.

Not a test that pytest collects; run it by hand:
    python -m specmoe_jax.benchmarks.studies.soak_server --minutes=10 --clients=64
Most clients read a stream; others ask for whole answers, go away in the middle, read slowly, or send too much, nonsense or a wrong
key. Each whole answer is compared with the one that the engine gives offline. The server runs in a process of its own, whose memory
is watched. The last line is one JSON document.
"""

import argparse
import asyncio
import collections
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import specmoe_jax as sm

HELD_OUT = pathlib.Path(sm.__file__).parent / "checkpoints" / "demo" / "held_out.txt"
KEY = "soak"
SETTLED = 0.25  # of the time, after which memory is compared
KINDS = {"stream": 70, "whole": 10, "leaves": 8, "slow": 4, "malformed": 3, "wrong_key": 3, "oversized": 2}  # and their weights
REFUSED = {"malformed": 400, "wrong_key": 401, "oversized": 413}


class Case(NamedTuple):
    prompt: str
    params: sm.SamplingParams
    text: str

    def body(self, *, stream: bool) -> dict:
        p = self.params
        drawn = {"temperature": p.temperature, "seed": p.seed}
        return {"prompt": self.prompt, "max_tokens": p.max_new_tokens, "stream": stream} | drawn


class Seen:
    """What the clients saw."""

    def __init__(self):
        self.kinds, self.wrong = collections.Counter(), []
        self.first_s, self.between_s, self.events = [], [], 0


def cases(engine: sm.Engine, count: int) -> tuple[list[Case], float]:
    """Requests with their answers, and the tokens per second of the job that gave them."""
    texts = [line for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    prompts = [texts[i % len(texts)][: 30 + i % 90] for i in range(count)]
    params = [sm.SamplingParams(max_new_tokens=16 + 7 * i % 48) for i in range(count)]
    engine.generate(prompts, params)  # compiles
    begun = time.monotonic()
    done = engine.generate(prompts, params)
    rate = sum(len(one.token_ids) for one in done) / (time.monotonic() - begun)
    drawn = [p.__class__(max_new_tokens=p.max_new_tokens, temperature=0.8, seed=i) for i, p in enumerate(params[: count // 8])]
    found = [Case(prompt, p, one.text) for prompt, p, one in zip(prompts, params, done, strict=True)]
    for prompt, p in zip(prompts, drawn, strict=False):  # one by one: a server knows each by the number 0
        found.append(Case(prompt, p, engine.generate([prompt], p)[0].text))
    return found, rate


async def respond(port: int, path: str, body: bytes, key: str) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    try:
        for start in range(0, len(body), 1 << 16):
            writer.write(body[start : start + (1 << 16)])
            await writer.drain()
    except ConnectionError:  # the server has refused the rest
        pass
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return status, reader, writer


async def lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Of a body in chunks, or of one that ends with the connection."""
    rest = b""
    while size := (await reader.readline()).strip():
        if not re.fullmatch(rb"[0-9a-f]+", size):
            rest = size + await reader.read()
            break
        if not (count := int(size, 16)):
            break
        rest += await reader.readexactly(count)
        await reader.readline()
        *whole, rest = rest.split(b"\n")
        for line in whole:
            yield line.decode()
    if rest:
        yield rest.decode()


async def refused(port: int, kind: str, seen: Seen) -> None:
    body, key = b'{"prompt": "a"', KEY
    if kind == "wrong_key":
        body, key = b'{"prompt": "a"}', "wrong"
    elif kind == "oversized":
        body = b'"' + b"a" * (5 << 20) + b'"'
    status, _, writer = await respond(port, "/v1/completions", body, key)
    writer.close()
    if status != REFUSED[kind]:
        seen.wrong.append((kind, status))


async def ask(port: int, case: Case, kind: str, seen: Seen, rng: random.Random) -> None:
    body, begun = json.dumps(case.body(stream=kind != "whole")).encode(), time.monotonic()
    status, reader, writer = await respond(port, "/v1/completions", body, KEY)
    try:
        if status == 429:
            seen.kinds["queue_full"] += 1
            await asyncio.sleep(1)
        elif status != 200:
            seen.wrong.append((kind, status))
        elif kind == "whole":
            answer = json.loads("".join([line async for line in lines(reader)]))
            check(case, answer["choices"][0]["text"], kind, seen)
        else:
            await read_stream(reader, case, kind, seen, rng, begun)
    finally:
        writer.close()


async def read_stream(reader, case: Case, kind: str, seen: Seen, rng: random.Random, begun: float) -> None:
    text, last, leaves_after = "", None, rng.randrange(1, 12) if kind == "leaves" else None
    async for line in lines(reader):
        if not line.startswith("data: {"):
            continue
        now, told = time.monotonic(), json.loads(line[6:])
        if "error" in told:
            seen.wrong.append((kind, told["error"]["message"]))
            return
        text += told["choices"][0]["text"]
        if kind != "slow":
            (seen.first_s if last is None else seen.between_s).append(now - (begun if last is None else last))
        last, seen.events = now, seen.events + 1
        if leaves_after is not None and (leaves_after := leaves_after - 1) == 0:
            return
        if kind == "slow":
            await asyncio.sleep(rng.random() * 0.2)
    check(case, text, kind, seen)


def check(case: Case, text: str, kind: str, seen: Seen) -> None:
    if text != case.text:
        seen.wrong.append((kind, case.prompt, text, case.text))


async def client(number: int, port: int, asked: list[Case], end: float, seen: Seen) -> None:
    rng = random.Random(number)
    while time.monotonic() < end:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        seen.kinds[kind] += 1
        try:
            await (refused(port, kind, seen) if kind in REFUSED else ask(port, rng.choice(asked), kind, seen, rng))
        except (ConnectionError, asyncio.IncompleteReadError, IndexError) as e:
            if kind != "oversized":  # whose connection may be closed while it sends
                seen.wrong.append((kind, repr(e)))


async def watch(pid: int, end: float) -> list[int]:
    """Resident bytes of the server, each second."""
    found = []
    while time.monotonic() < end:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
        found.append(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(1)
    return found


async def metrics(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^(specmoe_\S+) (\S+)$", text, flags=re.M)}


async def run(port: int, pid: int, asked: list[Case], clients: int, minutes: float) -> tuple[Seen, list[int], dict, float]:
    seen, begun, before = Seen(), time.monotonic(), await metrics(port)
    end = begun + 60 * minutes
    own = [client(number, port, asked, end, seen) for number in range(clients)]
    watching = asyncio.create_task(watch(pid, end))
    await asyncio.gather(*own)
    memory = await watching
    seconds, after = time.monotonic() - begun, await metrics(port)
    return seen, memory, {name: after[name] - before.get(name, 0) for name in after}, seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_s": cuts[49], "p95_s": cuts[94], "p99_s": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--preset", default="specmoe")
    parser.add_argument("--flow", help="an expert flow in place of the preset's")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--cases", type=int, default=64)
    args = parser.parse_args()
    model = sm.load_model(args.model)
    own = {"expert_flow": args.flow} if args.flow else {}
    plan = sm.PRESETS[args.preset](model.config).replace(batch_size=args.batch_size, deterministic_sampling=True, **own)
    asked, offline = cases(sm.Engine(model, plan), args.cases)
    flags = {"model": args.model, "preset": args.preset, "batch_size": args.batch_size, "api_key": KEY, "port": 0} | own
    flags |= {"max_tokens": 256, "progress": "none"}
    command = [sys.executable, "-m", "specmoe_jax", "serve", "--deterministic_sampling"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = next(line for line in server.stderr if line.startswith(("serving", "error")))
        port = re.search(r":(\d+) \(", said)
        assert port is not None, said
        seen, memory, counted, seconds = asyncio.run(run(int(port[1]), server.pid, asked, args.clients, args.minutes))
    finally:
        server.terminate()
        server.wait()
    settled = memory[int(len(memory) * SETTLED) :]
    report = {
        "clients": args.clients,
        "seconds": seconds,
        "requests": dict(seen.kinds),
        "wrong": seen.wrong[:10],
        "wrong_count": len(seen.wrong),
        "first_token": percentiles(seen.first_s),
        "between_tokens": percentiles(seen.between_s),
        "tokens_per_s": counted["specmoe_new_tokens_total"] / seconds,
        "offline_tokens_per_s": offline,
        "memory_first_bytes": settled[0],
        "memory_last_bytes": settled[-1],
        "memory_growth": settled[-1] / settled[0] - 1,
        "ended": {name: count for name, count in counted.items() if "requests_total" in name or "rejected" in name},
        "compilations_after_warmup": counted.get("specmoe_compilations_after_warmup_total"),
        "load_average": os.getloadavg(),
    }
    print(json.dumps(report))
    sys.exit(bool(seen.wrong))


if __name__ == "__main__":
    main()
