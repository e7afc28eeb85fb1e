"""Does the demo's memory stay flat, and what do many visitors at once get?

Visits of 2000 words one after the other, then visitors who ask again and again for a minute. Each
visit is a session of its own; each visitor has an address, as if a proxy stood in front. Every
answer is compared with the module's own.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
from report import ROOT, environment, table, write_section

sys.path.insert(0, str(ROOT))
from demo.settings import read_settings

SETTINGS = read_settings(ROOT / "app_config.yaml")
LABEL, TINY = SETTINGS.default_model, SETTINGS.models[0].source
LONG_WORDS, SHORT_WORDS = 2000, 100
NUM_TEXTS = 10  # of each length


def serve() -> None:
    """The demo with its own settings, the bundled model, and a proxy in front."""
    from demo import server

    queue = replace(SETTINGS.queue, proxies=1)
    server.serve(replace(SETTINGS, models=SETTINGS.models[:1], queue=queue))


def texts(num_words: int) -> list[str]:
    lines = Path(TINY, "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    rng = random.Random(0)
    starts = [rng.randrange(len(words) - num_words) for _ in range(NUM_TEXTS)]
    most = SETTINGS.limits.text_characters
    return [" ".join(words[start : start + num_words])[:most] for start in starts]


def perplexities(chosen: list[str]) -> dict[str, float]:
    """The module's own, by text."""
    from huggingface_hub.utils import disable_progress_bars

    from ppleval import Perplexity

    disable_progress_bars()
    scores = Perplexity().score(chosen, model_id=TINY)
    return {text: score.perplexity for text, score in zip(chosen, scores, strict=True)}


class Server:
    """The demo in a process of its own."""

    def __init__(self, port: int):
        command = [sys.executable, __file__, "--serve"]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            command, env=os.environ | {"GRADIO_SERVER_PORT": str(port)}, stdout=subprocess.DEVNULL
        )
        while True:
            time.sleep(0.2)
            assert self._process.poll() is None
            try:
                httpx.get(f"{self.url}/config")
                return
            except httpx.ConnectError:
                pass

    def memory_mb(self) -> float:
        """What it holds now, in MB (10^6 bytes); on Linux."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e6

    def end(self) -> float:
        """End it; the seconds that this took."""
        start = time.perf_counter()
        self._process.terminate()
        assert self._process.wait(60) == 0
        return time.perf_counter() - start


def visit(client: httpx.Client, text: str, address: str) -> float | int:
    """The perplexity, or the status of a request that is refused."""
    headers = {"X-Forwarded-For": address}
    sent = client.post("/gradio_api/call/score", json={"data": [text, LABEL]}, headers=headers)
    if sent.status_code != 200:
        return sent.status_code
    event = sent.json()["event_id"]
    answer = client.get(f"/gradio_api/call/score/{event}", headers=headers).text
    data = json.loads(answer.rpartition("event: complete\ndata: ")[2])
    return json.loads(data[1])["result"]["perplexity"]


def is_right(found: float, expected: float) -> bool:
    return abs(found - expected) < 1e-6 * expected


def one_after_the_other(server: Server, num_visits: int) -> tuple[list[list[str]], int]:
    """Rows of the memory after each sixth of the visits, and how many numbers were right."""
    expected = perplexities(texts(LONG_WORDS))
    rows, right = [], 0
    with httpx.Client(base_url=server.url, timeout=120) as client:
        rows.append(["0", f"{server.memory_mb():.0f}"])
        for i in range(1, num_visits + 1):
            text = random.Random(i).choice(list(expected))
            right += is_right(visit(client, text, "192.0.2.1"), expected[text])
            if i % (num_visits // 6) == 0:
                rows.append([str(i), f"{server.memory_mb():.0f}"])
    return rows, right


def all_at_once(server: Server, num_visitors: int, seconds: float) -> list[list[str]]:
    """Rows of what visitors get who ask again as soon as they have an answer."""
    expected = perplexities(texts(SHORT_WORDS))
    times, wrong, refused = [], [], []
    deadline = time.monotonic() + seconds

    def visitor(i: int) -> None:
        rng = random.Random(i)
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while time.monotonic() < deadline:
                text = rng.choice(list(expected))
                start = time.perf_counter()
                found = visit(client, text, f"192.0.2.{i}")
                if isinstance(found, int):
                    refused.append(found)
                    time.sleep(1)  # then asks again
                    continue
                times.append(time.perf_counter() - start)
                if not is_right(found, expected[text]):
                    wrong.append(text)

    threads = [threading.Thread(target=visitor, args=(i,)) for i in range(num_visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(times, n=20)
    return [
        ["answers", str(len(times))],
        ["wrong numbers", str(len(wrong))],
        ["refused (the queue is full)", str(refused.count(503))],
        ["refused (the quota)", str(refused.count(429))],
        ["seconds, median", f"{statistics.median(times):.2f}"],
        ["seconds, 95%", f"{cuts[-1]:.2f}"],
        ["MB afterwards", f"{server.memory_mb():.0f}"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="what the other runs start")
    parser.add_argument("--port", type=int, default=7950)
    parser.add_argument("--visits", type=int, default=300)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    server = Server(args.port)
    rows, right = one_after_the_other(server, args.visits)
    at_once = all_at_once(server, args.visitors, args.seconds)
    end_s = server.end()
    body = (
        f"{environment(['torch', 'gradio', 'httpx'])}\n"
        f"{os.cpu_count()} cores, which the visitors and other processes share with the server.\n\n"
        f"### {args.visits} visits of {LONG_WORDS} words, one after the other\n\n"
        f"{table(['visits', 'MB'], rows)}\n"
        f"{right} of {args.visits} perplexities were those of the module, to 1e-6.\n\n"
        f"### {args.visitors} visitors for {args.seconds:.0f} s, texts of {SHORT_WORDS} words\n\n"
        f"{table(['', ''], at_once)}\n"
        "Each visitor asks again as soon as there is an answer, or a second after a refusal.\n"
        f"SIGTERM ended the server in {end_s:.1f} s.\n"
    )
    write_section("The demo under load (bench_demo.py)", body)


if __name__ == "__main__":
    main()
