"""``pipedock ask --chat`` without a prompt: a conversation in a terminal, or with the lines of a file or a pipe.

Answers go to stdout, everything else to stderr, so ``pipedock ask --chat < questions > answers`` holds answers only.
"""

import argparse
import sys
import time
from contextlib import closing
from typing import Any, Dict, List, Optional

HELP = """\
/reset   start again (a system message stays)
/undo    forget the last question and its answer
/quit    end, as Ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer; what there is of it stays in the conversation."""


class Conversation:
    """``messages``: the system message, if there is one; ``parameters`` of each answer."""

    def __init__(self, client: Any, args: argparse.Namespace, messages: List[Dict[str, str]], parameters: Dict[str, Any]) -> None:
        self._client, self._args, self._parameters = client, args, parameters
        self._messages, self._fixed = list(messages), len(messages)
        self._terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Until the end of input or /quit. In a terminal an error ends the answer, elsewhere the conversation."""
        if self._terminal:
            try:
                import readline  # noqa: F401 - makes input() editable, with the arrow keys' history

                del readline
            except ImportError:
                pass
            self._note("A conversation with %s. Ctrl-C stops an answer, Ctrl-D ends, /help." % self._args.url)
        while True:
            question = self._question()
            if question is None or question == "/quit":
                return
            if not self._command(question):
                self._ask(question)

    def _question(self) -> Optional[str]:
        """The next one, without the blanks around it; None at the end. Ctrl-C drops a line; twice in a row it ends."""
        lines: List[str] = []
        dropped = False
        while True:
            try:
                lines.append(input(("you> ", "...> ")[bool(lines)] if self._terminal else ""))
            except EOFError:
                if self._terminal:
                    sys.stderr.write("\n")
                return " ".join(lines).strip() or None
            except KeyboardInterrupt:
                self._note("" if dropped else "\n(Ctrl-C again, Ctrl-D or /quit ends)")
                if dropped:
                    return None
                lines, dropped = [], True
                continue
            dropped = False
            if not lines[-1].endswith("\\"):
                return "\n".join(lines).strip()
            lines[-1] = lines[-1][:-1]

    def _command(self, question: str) -> bool:
        """Whether it was one, or nothing at all."""
        if question == "/reset":
            del self._messages[self._fixed :]
        elif question == "/undo":
            del self._messages[max(self._fixed, len(self._messages) - 2) :]
        elif question == "/help" or (question.startswith("/") and question[1:].isalpha()):
            self._note(HELP)
        else:
            return not question
        return True

    def _ask(self, question: str) -> None:
        """One question and its answer; both are kept when there is any of it."""
        from serve.client import ClientError, NotFound, Unauthorized

        self._messages.append({"role": "user", "content": question})
        answer, told, pieces = "", None, 0
        started = first = time.monotonic()
        try:
            with closing(self._client.chat_stream(self._messages, **self._parameters)) as stream:
                for piece in stream:
                    first = first if pieces else time.monotonic()
                    pieces += piece.finish_reason is not None or bool(piece.text)
                    told = piece.completion_tokens or told
                    answer += piece.text
                    self._show(piece.text)
            self._count(told or pieces, first - started, time.monotonic() - first)
        except KeyboardInterrupt:
            self._show(" [stopped]")
            self._count(pieces, first - started, time.monotonic() - first)
        except (NotFound, Unauthorized):
            raise  # the next question would meet the same
        except ClientError as error:
            if not self._terminal:
                raise
            self._note("%s%s" % ("\n" * bool(answer), error))
            answer = ""  # half of it is not what the model would have gone on with
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()

    def _show(self, text: str) -> None:
        """In a terminal without control characters: an answer must not move its cursor or change its title."""
        if self._args.answer.isatty():
            text = "".join(one for one in text if one in "\n\t" or ord(one) >= 32 and not 127 <= ord(one) < 160)
        self._args.answer.write(text)
        self._args.answer.flush()

    def _count(self, tokens: int, waited: float, seconds: float) -> None:
        """The first token's time belongs to the prompt."""
        self._show("\n")
        if tokens:
            speed = ", %.1f tokens/s" % ((tokens - 1) / seconds) if tokens > 1 and seconds > 0 else ""
            self._note("(%d token%s%s, the first after %.2f s)" % (tokens, "s"[: tokens != 1], speed, waited))

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
