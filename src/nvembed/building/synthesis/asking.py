"""Many requests at once, each until it has a valid answer or a reason why not.

In: requests; out: rows of the journal. What is in the journal already is not asked again. Next
file: ``run.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from nvembed.building.synthesis.answers import AnswerError, TaskList, WrittenExample, parse_answer
from nvembed.building.synthesis.config import SynthesisConfig
from nvembed.building.synthesis.endpoint import ChatEndpoint, EndpointError, UnansweredError
from nvembed.building.synthesis.journal import Journal
from nvembed.core.reporting import ProgressBar

# That many requests in a row without any answer: the endpoint is gone, not busy.
_GONE_AFTER = 10
_LONGEST_REJECT = 4000  # characters of a refused answer that are kept


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the model.

    Args:
        name: unique in the run; the same question has the same name whenever it is asked.
        prompt: the question.
        answer: what is expected.
    """

    name: str
    prompt: str
    answer: type[TaskList] | type[WrittenExample]


class Asker:
    """Asks and writes down.

    Args:
        endpoint: is open.
        journal: takes the answers.
        config: how many at once, how often again.
        bar: advances by one per request.
    """

    def __init__(
        self, endpoint: ChatEndpoint, journal: Journal, config: SynthesisConfig, bar: ProgressBar
    ) -> None:
        self.unanswered = 0
        self._answered = 0
        self._in_a_row = 0
        self._problem = ""
        self._endpoint = endpoint
        self._journal = journal
        self._config = config
        self._bar = bar

    async def ask_all(self, requests: Iterable[Request]) -> None:
        """Ask all requests that are not in the journal.

        Raises:
            EndpointError: the endpoint refuses requests for good or is gone.
        """
        waiting = iter(requests)

        async def work() -> None:
            for request in waiting:
                if request.name not in self._journal:
                    await self._ask(request)
                self._bar.advance()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            # All workers meet the same error; one of them tells it.
            raise errors.exceptions[0] from None
        if self.unanswered and not self._answered:
            raise self._gone()

    async def _ask(self, request: Request) -> None:
        attempts = prompt_tokens = answer_tokens = uncounted = 0
        problem = text = ""
        answer: TaskList | WrittenExample | None = None
        while answer is None and attempts < self._config.attempts:
            attempts += 1
            try:
                answered = await self._endpoint.ask(request.prompt)
            except UnansweredError as error:
                self._count_unanswered(str(error))
                return
            self._in_a_row = 0
            self._answered += 1
            prompt_tokens += answered.prompt_tokens or 0
            answer_tokens += answered.answer_tokens or 0
            uncounted += answered.prompt_tokens is None or answered.answer_tokens is None
            text = answered.text
            try:
                answer = parse_answer(text, request.answer)
            except AnswerError as error:
                problem = answered.problem or str(error)
        spent = {
            "attempts": attempts,
            "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens,
            "uncounted": uncounted,
        }
        if answer is None:
            rejected = {"rejected": problem, "text": text[:_LONGEST_REJECT]}
            self._journal.add(request.name, rejected | spent)
        else:
            self._journal.add(request.name, {"answer": answer.model_dump()} | spent)

    def _count_unanswered(self, problem: str) -> None:
        self.unanswered += 1
        self._in_a_row += 1
        self._problem = problem
        if self._in_a_row >= _GONE_AFTER:
            raise self._gone()

    def _gone(self) -> EndpointError:
        return EndpointError(
            f"{self._in_a_row} requests in a row came to nothing; the last: {self._problem}",
            where=self._config.endpoint,
            hint="What was answered is kept: run the same command again to go on",
        )
