"""What Gradio's queue lacks: a quota for each visitor, an end for results nobody fetched, and one
for runs that nobody waits for."""

import weakref
from collections import deque
from collections.abc import Callable

from fastapi import HTTPException
from gradio.context import LocalContext
from gradio.queueing import Event, Queue
from gradio.server_messages import EventMessage, ProcessCompletedMessage
from gradio.utils import LRUCache

from demo import settings
from demo.addresses import address_of

MOST_SESSIONS = 2000  # whose messages Gradio's queue keeps
NAME_CHARACTERS = 100  # of a session; Gradio's own have 11


def bound_queue(queue: Queue, limits: settings.Queue) -> None:
    """Refuse what is too much for one visitor, and forget what was left behind."""
    limit_each_visitor(queue, limits.per_address, limits.proxies)
    keep_latest_results(queue, limits.size)
    # Gradio bounds the messages of sessions, but not the numbers of their requests.
    queue.pending_event_ids_session = LRUCache(MOST_SESSIONS)


def limit_each_visitor(queue: Queue, most: int, proxies: int | None) -> None:
    """Take no more requests that wait or run than these from each address."""
    push = queue.push

    async def bounded_push(body, request, username):
        if body.session_hash is not None and len(body.session_hash) > NAME_CHARACTERS:
            raise HTTPException(400, "The name of the session is too long.")
        waiting = [event for of_id in queue.event_queue_per_concurrency_id.values()
                   for event in of_id.queue]  # fmt: skip
        running = [event for job in queue.active_jobs if job is not None for event in job]
        address = address_of(request, proxies)
        theirs = sum(address_of(event.request, proxies) == address for event in waiting + running)
        if theirs >= most:
            raise HTTPException(
                429,
                f"{theirs} requests from your address wait or run already, and no more are taken. "
                "Try again when one of them is done.",
            )
        return await push(body=body, request=request, username=username)

    queue.push = bounded_push


def keep_latest_results(queue: Queue, most: int) -> None:
    """Drop all but the latest results that nobody fetched; Gradio would keep them all."""
    waiting = deque()
    send = queue.send_message

    def send_message(event: Event, event_message: EventMessage) -> None:
        if isinstance(event_message, ProcessCompletedMessage):
            waiting.append(weakref.ref(event_message, waiting.remove))  # removed when it is fetched
            if len(waiting) > most:
                oldest = waiting.popleft()()
                oldest.success = False
                oldest.output = {"error": "Nobody fetched this result in time. Ask again."}
        send(event, event_message)

    queue.send_message = send_message


def wanted_here() -> Callable[[], bool]:
    """Whether a visitor still waits for what this thread answers.

    Stop and a lost connection mark it as not alive; Gradio's /cancel, which programs call, takes it
    from the queue's jobs. Gradio itself would let its thread run to the end.
    """
    page, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    if page is None or event_id is None:  # no request
        return lambda: True
    jobs = page._queue.active_jobs  # a list of places, of a fixed length
    return lambda: any(event._id == event_id and event.alive for job in jobs for event in job or ())


def stop(queue: Queue, session: str | None, endpoint: str) -> None:
    """Answer with nothing what this session asked an endpoint for: it leaves the queue, or ends
    with its next portion. Call it in the queue's event loop.

    Gradio's own way, /cancel, lets a page show an error.
    """
    running = [event for job in queue.active_jobs for event in job or ()]
    for of_id in queue.event_queue_per_concurrency_id.values():
        for event in [*of_id.queue, *running]:
            if event.session_hash != session or event.fn.api_name != endpoint or not event.alive:
                continue
            unchanged = {"data": [{"__type__": "update"} for _ in event.fn.outputs]}
            queue.send_message(event, ProcessCompletedMessage(output=unchanged, success=True))
            event.alive = False  # takes no further message
            if event in of_id.queue:
                of_id.queue.remove(event)
                del queue.event_ids_to_events[event._id]
