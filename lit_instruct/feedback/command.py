"""``lit-instruct label``: opens the database, hands out personal links, and serves the labelling page."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lit_instruct.feedback.guidelines import read_guidelines
from lit_instruct.feedback.store import Store
from lit_instruct.feedback.tasks import LoadedTasks, read_tasks
from lit_instruct.types import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

_ABOUT = """\
A page on which labelers rank responses, write demonstrations and write or flag prompts; docs/labelling.md says more.

  lit-instruct label labels.sqlite --tasks tasks.jsonl --labelers ann,bob --guidelines guidelines.md
  lit-instruct label labels.sqlite                       goes on: same tasks, same links, same port

It prints a personal link for each new labeler: whoever has it labels under that name. Stop it with Ctrl-C at any time;
what the page has called saved is in the database.
"""

_REPORT_SECONDS = 60.0
_LOOK_SECONDS = 0.5  # between two looks whether anything is left to do


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.\nDo: see lit-instruct label --help")


def main(arguments: Sequence[str]) -> None:
    """Run the command until it is interrupted or, with ``--until_done``, nothing is left to do.

    Args:
        arguments: behind ``label``.

    Raises:
        ConfigError: options that cannot work, or a package is missing.
        DataError: tasks or a database that cannot be used.
    """
    options = read_options(arguments)
    from lit_instruct.feedback.server import make_app

    guidelines = read_guidelines(options.guidelines) if options.guidelines else ()
    with (
        _listen(options.host, options.port) as listener,
        Store(options.database, seed=options.seed, lease_seconds=options.lease_minutes * 60) as store,
    ):
        _fill(store, options)
        server = _server(make_app(store, host=options.host, guidelines=guidelines))
        # Ctrl-C ends it, as the links say, from then on: the server takes the signal over only when it runs, and where
        # a process was started with it ignored (a shell's background jobs) it would be lost until then.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order and says it again
            _print_links(store, options, listener.getsockname()[1])
            with _progress_lines(store), _ending(server, store, options.until_done):
                server.run(sockets=[listener])
        print(f"\nStopped. {_progress_line(store)}")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options, and see that they and the packages can work.

    Args:
        arguments: behind ``label``.

    Raises:
        ConfigError: they cannot.
    """
    options = _parser().parse_args(arguments)
    _check_packages()
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-instruct label",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("database", type=Path, metavar="DB", help="the file that keeps everything; made if it is not there")
    add("--tasks", nargs="+", default=[], metavar="FILE", help="add the tasks of these files that it does not have yet")
    add("--labelers", type=_names, default=[], metavar="NAME,NAME", help="add these labelers")
    add("--new_links", type=_names, default=[], metavar="NAME,NAME", help="new links for these; their old ones end")
    about = "add the labelers of this database, whose links then open this one too"
    add("--labelers_from", type=Path, metavar="DB", help=about)
    add("--guidelines", type=Path, metavar="FILE", help="what labelers shall go by, in Markdown")
    add("--overlap", type=float, default=0.2, help="share of the new tasks that go to several labelers (default 0.2)")
    add("--overlap_labelers", type=int, default=2, help="how many labelers that is (default 2)")
    add("--lease_minutes", type=float, default=30, help="how long a task waits for who was given it (default 30)")
    about = "end by itself when for so long nobody has had anything left to do; an undo starts it anew"
    add("--until_done", type=float, metavar="SECONDS", help=about)
    add("--seed", type=int, default=1, help="of a new database: draws overlap and orders of responses (default 1)")
    add("--host", default="127.0.0.1", help="name or address of this machine to listen at (default: itself alone)")
    add("--allow_remote", action="store_true", help="needed for a host that other machines reach")
    add("--port", type=int, default=8642, help="0: any free one (default 8642)")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or len(name) > 64 or not name.isprintable():
            raise argparse.ArgumentTypeError(f"got the name {name!r}; need 1 to 64 printable characters")
    return names


def _check(options: argparse.Namespace) -> None:
    from lit_instruct.feedback.access import is_loopback

    if not 0 <= options.overlap <= 1:
        raise ConfigError(f"--overlap: got {options.overlap:g}; need a share from 0 to 1.")
    if options.overlap_labelers < 2:
        raise ConfigError(f"--overlap_labelers: got {options.overlap_labelers}; need at least 2.")
    if not 0 < options.lease_minutes <= 7 * 24 * 60:
        raise ConfigError(f"--lease_minutes: got {options.lease_minutes:g}; need more than 0 and at most a week.")
    if options.until_done is not None and not 0 <= options.until_done < float("inf"):
        raise ConfigError(f"--until_done: got {options.until_done:g}; need a number of seconds of at least 0.")
    if options.labelers_from and not options.labelers_from.is_file():
        raise ConfigError(f"--labelers_from: got {options.labelers_from}, which is no file; need a labelling database.")
    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port: got {options.port}; need 0 to 65535.")
    if options.host in ("", "0.0.0.0", "::"):
        raise ConfigError(
            f"--host: got {options.host!r}; need the one name or address by which labelers reach this machine.\n"
            "Do: give that; links carry it, and requests under other names are refused."
        )
    if not is_loopback(options.host) and not options.allow_remote:
        raise ConfigError(
            f"--host: got {options.host!r}, which other machines reach; need --allow_remote for that.\n"
            "Do: add it if the network is your own, or leave --host out and reach this machine by a tunnel: "
            f"ssh -L {options.port}:127.0.0.1:{options.port} THIS_MACHINE"
        )


def _check_packages() -> None:
    needed = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py"}
    missing = [package for name, package in needed.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"got no {', '.join(missing)}; need the packages of the labelling page.\n"
            "Do: pip install 'lit-instruct[label]'"
        )


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before anything is printed or written."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host, --port: got {host}, {port}, where nothing can listen ({error}).\n"
            "Do: give another port (0: any free one), and a host that is this machine."
        ) from error
    with listener:
        yield listener


def _fill(store: Store, options: argparse.Namespace) -> None:
    """Add tasks and labelers, and see that there are enough of both."""
    loaded = read_tasks(options.tasks) if options.tasks else LoadedTasks([], [])
    if options.labelers_from:
        with Store(options.labelers_from) as other:
            store.take_labelers(other.token_hashes())
    store.add_labelers(options.labelers)
    known = store.token_hashes()
    unknown = [name for name in options.new_links if name not in known]
    if unknown:
        raise ConfigError(f"--new_links: got {', '.join(unknown)}; need some of {', '.join(known) or '(none)'}.")
    if not known:
        raise ConfigError("--labelers: got none; need at least one.\nDo: give names, such as --labelers ann,bob")
    new = store.add_tasks(loaded.tasks, overlap=options.overlap, overlap_labelers=options.overlap_labelers)
    if options.tasks:
        print(f"Tasks: {new} added, {len(loaded.tasks) - new} known already.")
    if loaded.alike:
        print(f"Left out, since all responses are the same text: {len(loaded.alike)}, the first {loaded.alike[0]}.")
    wanted = store.most_wanted()
    if not wanted:
        raise ConfigError("--tasks: got none; need at least one.\nDo: give a file of tasks; see docs/labelling.md.")
    if wanted > len(known):
        print(f"Note: some tasks want {wanted} labelers and there are {len(known)}; they wait for --labelers NAME.")


def _print_links(store: Store, options: argparse.Namespace, port: int) -> None:
    """Say under which links labelers come in; a token is shown once and stored as a hash."""
    from lit_instruct.feedback.access import is_loopback, new_token, token_hash

    if not is_loopback(options.host):
        print(
            f"WARNING: other machines reach this server at {options.host}. What is sent is not encrypted: whoever "
            "listens on the network can read prompts, answers and links, and label under another name."
        )
    host = f"[{options.host}]" if ":" in options.host else options.host
    page = f"http://{host}:{port}/"
    print(f"Labelling at {page} with {store.path}; Ctrl-C ends it. Personal links:")
    for name, kept in store.token_hashes().items():
        if kept is None or name in options.new_links:
            token = new_token()
            store.set_token_hash(name, token_hash(token))
            print(f"  {name}  {page}#{token}")
        else:
            print(f"  {name}  as it was made before (--new_links {name} makes another)")
    print(_progress_line(store), flush=True)


def _progress_line(store: Store) -> str:
    done, tasks = store.totals()
    people = ", ".join(f"{name} {store.progress(name).answered}" for name in store.token_hashes())
    return f"{done} of {tasks} tasks are done; answers: {people}."


def _progress_lines(store: Store) -> AbstractContextManager[None]:
    """Print the progress once a minute, if there was any."""
    last = _progress_line(store)

    def report() -> bool:
        nonlocal last
        line = _progress_line(store)
        if line != last:
            print(line, flush=True)
        last = line
        return False

    return _beside(report, _REPORT_SECONDS)


def _ending(server: uvicorn.Server, store: Store, seconds: float | None) -> AbstractContextManager[None]:
    """Tell the server to end when nothing has been left to do for so many seconds; None: never."""
    if seconds is None:
        return contextlib.nullcontext()
    since: float | None = None

    def look() -> bool:
        nonlocal since
        now = time.monotonic()
        since = (since or now) if store.nothing_left() else None
        if since is None or now - since < seconds:
            return False
        server.should_exit = True
        return True

    return _beside(look, _LOOK_SECONDS)


@contextmanager
def _beside(look: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds, in a thread, until it returns True or the block ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            if look():
                return

    thread = threading.Thread(target=run, daemon=True)
    try:  # Ctrl-C may come while it starts
        thread.start()
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def _server(app: ASGIApp) -> uvicorn.Server:
    """Make the server. Nothing of a request is logged: headers carry tokens."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)
