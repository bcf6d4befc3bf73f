"""Scores of a server that is asked over HTTP."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests
import torch
from torch import Tensor
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import Retry

from lit_instruct.rewards.base import Scorer, Texts, as_scores, shortened, texts_of
from lit_instruct.rewards.bounded_http import AnswerTooLongError, BoundedAdapter
from lit_instruct.types import ConfigError, PromptBatch, Responses

_ANSWER_BYTES = 64 * 1024  # any answer may have, headers included
_ROW_BYTES = 64  # and so much more for each row
_SECRET = re.compile(r"token|secret|passw|credential|auth|api_?key|^key$|^sig", re.IGNORECASE)
_LONGEST_WAIT = 60.0
_TRY_AGAIN = frozenset({429, *range(500, 600)})
_WRONG_ADDRESS = frozenset({*range(300, 400), 401, 403, 404, 405})


class HttpScorer(Scorer):
    """Scores by a server.

    One request holds some of the rows, and its answer one score for each, in their order::

        POST URL   {"prompts": [...], "responses": ["...", ...], "columns": {"name": [...], ...}}
        200        {"scores": [0.5, ...]}

    A prompt is what the data had, a text or a list of chat messages. No answer, 429 and every 5xx are tried again, with
    waits that double and vary at random (or that ``Retry-After`` asks for), so a request must be repeatable. Before
    training one request with empty lists is sent: whatever is answered, an address that nobody serves is found then.

    The server is not trusted: an answer is plain JSON of at most 64 KiB and 64 bytes a row, it is there whole in
    ``timeout`` seconds however slowly it drips in, and redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        *,
        token_variable: str | None = None,
        columns: list[str] | None = None,
        batch_rows: int = 64,
        parallel: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
    ):
        """Describe the server.

        Args:
            url: where to post, http:// or https://. It is written into the saved configuration and into errors, so it
                may hold no password and no token.
            token_variable: name of the environment variable that holds a token, sent as "Authorization: Bearer TOKEN".
                The token itself is written nowhere. Null: none is sent.
            columns: names of the data's other columns to send; null: all.
            batch_rows: rows a request.
            parallel: requests under way at a time, a process.
            timeout: seconds until the answer must be there whole, each time.
            retries: how often a request is tried again.
            backoff: seconds before the third try (the second follows at once); doubles with each, up to a minute, and
                up to this much is added at random.
        """
        super().__init__()
        _check_url(url)
        for name, value, least in (
            ("batch_rows", batch_rows, 1),
            ("parallel", parallel, 1),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < least:
                raise ConfigError(f"HttpScorer {name}: got {value}; need at least {least}.")
        if not timeout > 0:
            raise ConfigError(f"HttpScorer timeout: got {timeout}; need more than 0 seconds.")
        if token_variable is not None and not os.environ.get(token_variable):
            raise ConfigError(
                f"HttpScorer token_variable: the environment variable {token_variable!r} is not set. Do: export it, or "
                "leave token_variable out."
            )
        self.url = url
        self._name = f"reward at {url.partition('?')[0]}"
        self.token_variable = token_variable
        self.columns = columns
        self.batch_rows = batch_rows
        self.parallel = parallel
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff

    @torch.no_grad()
    def forward(self, prompts: PromptBatch, responses: Responses, *, tokenizer: Any) -> Tensor:
        """Ask the server, several requests at a time.

        Args:
            prompts: B prompts with their rows.
            responses: their responses.
            tokenizer: the policy's.

        Returns:
            fp32 ``[B]``.

        Raises:
            ConfigError: the server gives no answer, one that is too long, or one that is not B finite numbers.
        """
        texts = self._chosen(texts_of(prompts, responses, tokenizer))
        device = responses.response_ids_BR.device
        parts = [_part(texts, start, self.batch_rows) for start in range(0, len(texts.responses), self.batch_rows)]
        bodies = [self._body(part) for part in parts]
        with self._session(_TRY_AGAIN) as session, ThreadPoolExecutor(self.parallel) as pool:
            answers = [pool.submit(self._ask, session, body) for body in bodies]
            try:
                return torch.cat(
                    [
                        as_scores(answer.result(), source=self._name, texts=part, device=device)
                        for answer, part in zip(answers, parts, strict=True)
                    ]
                )
            finally:
                pool.shutdown(cancel_futures=True)  # after an error the rest need not be asked

    def check(self, tokenizer: Any) -> None:
        """Find out whether somebody serves the address.

        Args:
            tokenizer: not needed.

        Raises:
            ConfigError: nobody answers, or what is there refuses to be asked.
        """
        with self._session(frozenset()) as session:
            response = self._post(session, self._body(Texts([], [], {})))
        if response.status_code in _WRONG_ADDRESS:
            raise self._refused(response)

    def check_columns(self, columns: Collection[str]) -> None:
        """The columns to send must be there.

        Args:
            columns: of the prompts' rows.

        Raises:
            ConfigError: one is not.
        """
        missing = [name for name in self.columns or () if name not in columns]
        if missing:
            raise ConfigError(
                f"HttpScorer columns: got {missing[0]!r}, and the data have no such column (found: "
                f"{', '.join(map(repr, columns)) or 'none'}). Do: check the name."
            )

    def _chosen(self, texts: Texts) -> Texts:
        if self.columns is None:
            return texts
        self.check_columns(texts.columns)
        return texts._replace(columns={name: texts.columns[name] for name in self.columns})

    def _body(self, texts: Texts) -> bytes:
        for name, values in texts.columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{self._name}: the column {name!r} cannot be written as JSON ({error}). Do: name the "
                    "columns to send (columns), or change the data."
                ) from error
        return json.dumps(texts._asdict(), allow_nan=False).encode()

    def _session(self, try_again: frozenset[int]) -> requests.Session:
        session = _Session()
        retry = _Retry(
            total=self.retries,
            allowed_methods=None,  # a POST too
            status_forcelist=try_again,
            backoff_factor=self.backoff / 2,  # urllib3 waits twice this before the third try
            backoff_jitter=self.backoff,
            backoff_max=_LONGEST_WAIT,
            raise_on_status=False,
        )
        adapter = BoundedAdapter(
            max_retries=retry,
            pool_maxsize=self.parallel,
            most_bytes=_ANSWER_BYTES + _ROW_BYTES * self.batch_rows,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        session.headers["Content-Type"] = "application/json"
        session.headers["Accept-Encoding"] = "identity"  # a few bytes that unpack to gigabytes are nothing to ask for
        if self.token_variable is not None:
            session.auth = _Bearer(os.environ[self.token_variable])
        return session

    def _ask(self, session: requests.Session, body: bytes) -> Any:
        response = self._post(session, body)
        if response.status_code != 200:
            raise self._refused(response)
        packed = response.headers.get("Content-Encoding", "identity")
        if packed.strip().lower() != "identity":
            raise ConfigError(
                f"{self._name}: got an answer in the Content-Encoding {shortened(packed)}; need plain JSON, which was "
                "asked for. Do: switch compression off in the server or the proxy before it."
            )
        try:
            answer = json.loads(_content(response))
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits
            raise ConfigError(
                f'{self._name}: got {shortened(_text(response))}; need JSON: {{"scores": [...]}}. Do: look into the '
                "server."
            ) from error
        if not isinstance(answer, dict) or "scores" not in answer:
            raise ConfigError(
                f'{self._name}: got {shortened(answer)}; need {{"scores": [...]}}. Do: look into the server.'
            )
        scores = answer["scores"]
        if isinstance(scores, list) and any(isinstance(score, bool) for score in scores):  # numbers to Python alone
            raise ConfigError(
                f"{self._name}: got {shortened(scores)}; need numbers. Do: send 1 and 0 for true and false."
            )
        return scores

    def _post(self, session: requests.Session, body: bytes) -> requests.Response:
        try:
            response = session.post(self.url, data=body, timeout=self.timeout, allow_redirects=False, stream=True)
            response.raw.release_conn()  # read already; the next request may take the connection
            return response
        except AnswerTooLongError as error:
            raise ConfigError(
                f"{self._name}: got an answer of more than {error.most:,} bytes for {self.batch_rows} rows; need "
                f"{_ROW_BYTES} bytes a row and {_ANSWER_BYTES:,} at most. Do: check the address, and that the server "
                'answers {"scores": [...]} and nothing else.'
            ) from error
        # The last two: headers, and lengths of pieces, that cannot be.
        except (requests.RequestException, HTTPError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self._name}: got no answer in {self.retries + 1} tries of at most {self.timeout:g} seconds: "
                f"{self._why(error)}. Do: check the address and that the server runs, or raise timeout or retries."
            ) from error

    def _why(self, error: Exception) -> str:
        """The cause, without the address, which may have parameters."""
        cause = getattr(error.args[0], "reason", None) if error.args else None
        query = urlsplit(self.url).query
        reason = str(cause or error)
        return _cut(reason.replace(f"?{query}", "") if query else reason).rstrip(".")

    def _refused(self, response: requests.Response) -> ConfigError:
        tries = f" after {self.retries + 1} tries" if response.status_code in _TRY_AGAIN else ""
        reason = f" {_cut(response.reason)}" if response.reason else ""
        return ConfigError(
            f"{self._name}: the server answered {response.status_code}{reason}{tries}: "
            f"{shortened(_text(response))}. Do: look into the server's log; for 401 and 403 see token_variable."
        )


def _check_url(url: str) -> None:
    """Refuse what is no address, and what would carry a secret into the saved configuration."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not close
        usable = False
    if not usable:
        shown = shortened(url.rpartition("@")[2].partition("?")[0])
        raise ConfigError(
            f"HttpScorer url: got {shown}; need one that begins with http:// or https:// and names a host. Do: give "
            "it whole, as http://localhost:8000/score."
        )
    secrets = ["a user name or password"] if "@" in parts.netloc else []
    secrets += [f"the parameter {name!r}" for name, _ in parse_qsl(parts.query) if _SECRET.search(name)]
    if secrets:
        raise ConfigError(
            f"HttpScorer url: got {secrets[0]} in the address of {parts.hostname!r}, which would be written into the "
            "saved configuration. Do: take it out, export it as an environment variable and name that as "
            "token_variable."
        )


def _content(response: requests.Response) -> bytes:
    return response.raw.data or b""  # None where it is empty


def _text(response: requests.Response) -> str:
    return _content(response).decode("utf-8", errors="replace")


def _cut(text: str) -> str:
    """What a server or a library says, as one line of bearable length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 300 else f"{line[:300]} ..."


class _Session(requests.Session):
    """Follows no redirect, and does not even parse where it leads: anything may stand there."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Bearer(requests.auth.AuthBase):
    """Sends a token. As ``auth`` and not as a header, which entries of ~/.netrc would replace."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class _Retry(Retry):
    """Does as ``Retry-After`` asks, within reason."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        try:
            asked = super().get_retry_after(response)
        except (InvalidHeader, ValueError, OverflowError):  # neither seconds nor a date that there is
            return None
        return None if asked is None else min(asked, _LONGEST_WAIT)


def _part(texts: Texts, start: int, size: int) -> Texts:
    rows = slice(start, start + size)
    columns = {name: values[rows] for name, values in texts.columns.items()}
    return Texts(texts.prompts[rows], texts.responses[rows], columns)
