"""``pipedock ask``: a client on the command line, for one prompt or a conversation."""

import argparse
import sys
from typing import Any, Dict, List, Optional

from . import api_key, flags
from .progress import say

HELP = "ask a running server: one prompt, streamed or not, or a conversation (--chat)"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", help='the prompt as the model shall see it, or with --chat the first message; "-" reads stdin'
    )
    parser.add_argument("--url", required=True, type=flags.url, metavar="U", help="the server, as pipedock serve prints it")
    parser.add_argument("--stream", action="store_true", help="show tokens as they come")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="talk through the server's chat template; without a prompt, a conversation (/help there)",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message")
    parser.add_argument(
        "--max-new-tokens", type=flags.whole(1), metavar="N", help="at most N tokens; by default until the model ends"
    )
    parser.add_argument(
        "--temperature",
        type=flags.temperature,
        metavar="T",
        help="sample at this temperature; default: always the likeliest token, as at 0",
    )
    parser.add_argument("--seed", type=flags.whole(0), metavar="S", help="repeat the same sampling")
    parser.add_argument("--api-key-file", metavar="F", help="file with the server's API key")
    parser.add_argument(
        "--timeout", type=flags.seconds, default=300.0, metavar="S", help="seconds to wait for the next byte; default 300"
    )


def run(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    from pipeline_train.errors import RunFailed, UserError
    from serve.client import Client, ClientError, Invalid, NotFound, Unauthorized, Unreachable

    if args.system and not args.chat:
        raise UserError("--system goes with --chat; a plain prompt is sent as it is")
    if args.prompt is None and not args.chat:
        raise UserError("give a prompt, or --chat for a conversation")
    if args.prompt is None and args.json:
        raise UserError("a conversation has no JSON document: give a prompt, or leave --json out")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        with Client(args.url, api_key=api_key.read(args.api_key_file), timeout=args.timeout, retries=3, say=say) as client:
            if prompt is None:
                from .chat import Conversation

                Conversation(client, args, _start(args), _chat_parameters(args)).run()
                return None
            return _chat(client, args, prompt) if args.chat else _complete(client, args, prompt)
    except (Invalid, NotFound, Unauthorized) as error:
        raise UserError("%s: %s" % (args.url, _hint(error, args.chat)))
    except Unreachable as error:
        why = str(error).replace(args.url + ": ", "")
        raise UserError("%s: no server there (%s); start one with pipedock serve --model DIR" % (args.url, why))
    except ClientError as error:
        raise RunFailed("%s: %s" % (args.url, str(error).replace(args.url + ": ", "")))


def text(document: Dict[str, Any]) -> str:
    return str(document["text"])


def _complete(client: Any, args: argparse.Namespace, prompt: str) -> Optional[Dict[str, Any]]:
    sampled = bool(args.temperature) or args.seed is not None
    parameters = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature or None, "seed": args.seed}
    parameters["do_sample"] = True if sampled else None
    if not args.stream or args.json:
        made = client.generate(prompt, **parameters)
        return {
            "text": made.text,
            "finish_reason": made.finish_reason,
            "generated_tokens": made.generated_tokens,
            "seed": made.seed,
        }
    for piece in client.generate_stream(prompt, **parameters):
        _show(args, piece.text)
    _show(args, "\n")
    return None


def _chat(client: Any, args: argparse.Namespace, prompt: str) -> Optional[Dict[str, Any]]:
    messages = _start(args) + [{"role": "user", "content": prompt}]
    if not args.stream or args.json:
        made = client.chat(messages, **_chat_parameters(args))
        return {"text": made.content, "finish_reason": made.finish_reason, "generated_tokens": made.completion_tokens}
    for piece in client.chat_stream(messages, **_chat_parameters(args)):
        _show(args, piece.text)
    _show(args, "\n")
    return None


def _start(args: argparse.Namespace) -> List[Dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _chat_parameters(args: argparse.Namespace) -> Dict[str, Any]:
    """On the chat route an absent temperature would sample: 0 is greedy."""
    sampled = bool(args.temperature) or args.seed is not None
    return {"max_tokens": args.max_new_tokens, "temperature": (args.temperature or None) if sampled else 0.0, "seed": args.seed}


def _show(args: argparse.Namespace, piece: str) -> None:
    args.answer.write(piece)
    args.answer.flush()


def _hint(error: Any, chat: bool) -> str:
    if error.status in (401, 403):
        return "the API key is missing or wrong; --api-key-file F sends one"
    if error.status in (404, 405):
        return "no such route here" + (
            "; this server has no chat, leave --chat out" if chat else "; is this a text generation server?"
        )
    return str(error)
