"""Bodies of the native routes: a whole answer, or one event per token."""

from typing import AsyncGenerator, List

from msgspec import UNSET

from .errors import ApiError
from .params import Request
from .row import Job
from .service import Service
from .shapes import Details, Generated, Sequence, StreamDetails, StreamEvent, data


def generated(request: Request, best: Job, others: List[Job]) -> Generated:
    """The body of a whole answer; details only when asked for."""
    p = request.parameters
    answer = Generated(_full(request, best))
    if p.details or p.decoder_input_details:
        answer.details = Details(best.finish_reason, len(best.tokens), best.accepted.sampling.seed, best.prefill, best.tokens)
        answer.details.top_tokens = best.top_tokens or UNSET
        if others:
            answer.details.best_of_sequences = [
                Sequence(
                    _full(request, job),
                    job.finish_reason,
                    len(job.tokens),
                    job.accepted.sampling.seed,
                    job.prefill,
                    job.tokens,
                    job.top_tokens or UNSET,
                )
                for job in others
            ]
    return answer


async def stream_events(service: Service, request: Request) -> AsyncGenerator[bytes, None]:
    """One event per token; the last has the whole text. An error is an event too, the last one."""
    index = 0
    events = service.stream(request)
    try:
        async for job, event in events:
            if isinstance(event, bytes):
                yield event
                continue
            index += 1
            one = StreamEvent(index, event.token, event.top or UNSET)
            if event.finish_reason:
                one.generated_text = _full(request, job)
                if request.parameters.details:
                    one.details = StreamDetails(
                        job.finish_reason, len(job.tokens), job.accepted.sampling.seed, len(job.accepted.ids)
                    )
            yield data(one)
    except ApiError as error:
        yield data(error.body())
    finally:
        await events.aclose()


def _full(request: Request, job: Job) -> str:
    return (request.inputs if request.parameters.return_full_text else "") + job.generated_text
