"""Who may see and touch the tasks: credentials, sessions, and the gate in front of every route.

Owns the session cookie, the check that an unsafe request comes from our own pages, and the limit on bad logins. Every
router of the web side depends on `Gate.admit`, the stream too, so that nothing is open by being forgotten.

A session is a signed token, so that every process with the same secret key accepts it. What a logout revokes is
remembered here until the token would have expired, and is known to the other processes through `Visits`.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import logging
import re
import secrets
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from time import monotonic, time
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from itsdangerous import BadData, URLSafeSerializer
from starlette.requests import HTTPConnection

from ..errors import BackendUnavailable, TaskDefinitionError
from .visits import Visits

logger = logging.getLogger("taskflow")

COOKIE = "taskflow_token"
SIGNED_BY = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SHOWS_NO_TASK = ("/health", "/ready", "/auth/logout")
MOST_BAD_LOGINS = 10
BAD_LOGIN_WINDOW = 60.0
"""Seconds for which a bad login counts."""
MOST_REMEMBERED = 10_000
"""Clients whose bad logins are counted, and revoked sessions; beyond that the oldest are forgotten."""
FORWARDED = (
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "true-client-ip",
    "fastly-client-ip",
    "x-envoy-external-address",
)
FORWARDED_PREFIXES = ("x-forwarded-", "x-original-", "cf-")
"""Headers that only a proxy sends: what it forwards is from elsewhere."""
LOCAL_ONLY = (
    "open to this machine only, under the name localhost and without a proxy: "
    "give TaskAdmin(auth=...) to log in from elsewhere"
)
HOST = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[a-zA-Z0-9.-]+))(?::\d{1,5})?")
"""A Host header as it should be."""
TEST_CLIENT, TEST_HOST = "testclient", "testserver"
"""The client address of Starlette's TestClient, which no socket has, and the host that it asks for."""


class Role(StrEnum):
    READ = "read"
    """Sees everything, changes nothing."""
    OPERATE = "operate"


Verdict = bool | str
"""Whether somebody may come in, or their role; True is *operate*."""


@runtime_checkable
class TaskAuthBackend(Protocol):
    """Judges a user name and a password: yes, no, or in which role. Subclass it, or have the method; it may be `async`,
    and where it is not it may block."""

    @abstractmethod
    def authenticate_user(self, username: str, password: str) -> Verdict | Awaitable[Verdict]: ...


Credentials = tuple[str, str] | tuple[str, str, str]
"""A name, a password and, where it is not *operate*, a role."""
Auth = Credentials | Sequence[Credentials] | TaskAuthBackend


class FixedCredentials:
    """A list of pairs. Takes the same time whether the name, the password or nothing is right."""

    def __init__(self, pairs: Iterable[Credentials]) -> None:
        known = ((*pair, Role.OPERATE)[:3] for pair in pairs)
        self._pairs = [(digest(name), digest(password), Role(role)) for name, password, role in known]

    def authenticate_user(self, username: str, password: str) -> Verdict:
        given = digest(username), digest(password)
        found: Verdict = False
        for name, secret, role in self._pairs:
            if hmac.compare_digest(name, given[0]) & hmac.compare_digest(secret, given[1]):
                found = role
        return found


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def auth_backend(auth: Auth | None) -> TaskAuthBackend | None:
    """Raises TaskDefinitionError for what is neither a pair, nor a list of pairs, nor a backend."""
    if auth is None or (isinstance(auth, TaskAuthBackend) and not isinstance(auth, type)):
        return auth
    pairs = [auth] if is_pair(auth) else auth
    if isinstance(pairs, list | tuple) and pairs and all(is_pair(pair) for pair in pairs):
        return FixedCredentials(pairs)  # type: ignore[arg-type]
    raise TaskDefinitionError(
        "auth: expected (username, password), (username, password, 'read'), a list of such, or a TaskAuthBackend"
    )


def is_pair(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) and part for part in value):
        return False
    return len(value) == 2 or (len(value) == 3 and value[2] in tuple(Role))


# -- sessions


@dataclass(frozen=True, slots=True)
class Session:
    session_id: str
    username: str
    expires: int
    """Seconds since the epoch."""
    role: Role = Role.OPERATE


class Sessions:
    """Signed tokens of people who logged in, and the ones that were revoked since."""

    def __init__(self, secret_key: str | None, seconds: int, *, clock: Callable[[], float] = time) -> None:
        key = secrets.token_bytes(32) if secret_key is None else secret_key.encode("utf-8", "surrogatepass")
        self._signer = URLSafeSerializer(key, "taskflow session", signer_kwargs=SIGNED_BY)
        self.seconds = seconds
        self._clock = clock
        self._revoked: OrderedDict[str, int] = OrderedDict()

    def issue(self, username: str, role: Role = Role.OPERATE) -> str:
        expires = int(self._clock()) + self.seconds
        claims = {"sid": secrets.token_urlsafe(12), "sub": username, "exp": expires, "role": role}
        return str(self._signer.dumps(claims))

    def read(self, token: str) -> Session | None:
        """The session of a token that we signed, that has not expired and was not revoked."""
        try:
            claims = self._signer.loads(token)
        except BadData:
            return None
        session = Session(claims["sid"], claims["sub"], claims["exp"], Role(claims.get("role", Role.READ)))
        if session.expires <= self._clock() or session.session_id in self._revoked:
            return None
        return session

    def revoke(self, session: Session) -> None:
        now = self._clock()
        for session_id in [known for known, expires in self._revoked.items() if expires <= now]:
            del self._revoked[session_id]
        while len(self._revoked) >= MOST_REMEMBERED:
            self._revoked.popitem(last=False)
        self._revoked[session.session_id] = session.expires


Attempts = OrderedDict[str, deque[tuple[float, str]]]
"""Client or name -> when, and the other of the two; oldest first."""


class LoginLimit:
    """Counts bad logins by client and by name. An attempt is bad until it was found good, so that many at once gain
    nothing; what was good forgives the bad ones of the same name from the same client, and no others."""

    def __init__(self, *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._by_client: Attempts = OrderedDict()
        self._by_name: Attempts = OrderedDict()

    def attempt(self, client: str, username: str) -> bool:
        """False when this client, or whoever tries this name, has to wait."""
        of_client, of_name = self._recent(self._by_client, client), self._recent(self._by_name, username)
        if len(of_client) >= MOST_BAD_LOGINS or len(of_name) >= MOST_BAD_LOGINS:
            return False
        of_client.append((self._clock(), username))
        of_name.append((self._clock(), client))
        return True

    def succeeded(self, client: str, username: str) -> None:
        forgive(self._by_client, client, username)
        forgive(self._by_name, username, client)

    def _recent(self, attempts: Attempts, key: str) -> deque[tuple[float, str]]:
        found = attempts.setdefault(key, deque())
        attempts.move_to_end(key)
        while found and found[0][0] <= self._clock() - BAD_LOGIN_WINDOW:
            found.popleft()
        while len(attempts) > MOST_REMEMBERED:
            attempts.popitem(last=False)
        return found


def forgive(attempts: Attempts, key: str, other: str) -> None:
    kept = deque(attempt for attempt in attempts.get(key, ()) if attempt[1] != other)
    if kept:
        attempts[key] = kept
    else:
        attempts.pop(key, None)


# -- the gate


class Gate:
    """In front of every route. Without a backend it opens for this machine only."""

    def __init__(
        self, backend: TaskAuthBackend | None, sessions: Sessions, visits: Visits, limit: LoginLimit | None = None
    ) -> None:
        self._backend = backend
        self.sessions = sessions
        self._visits = visits
        self.limit = limit or LoginLimit()

    @property
    def asks_for_login(self) -> bool:
        return self._backend is not None

    async def admit(self, request: Request) -> None:
        """The dependency of every route. Raises HTTPException: 401 without a session, 403 from elsewhere, and where
        something is to be changed, for whoever may only read."""
        await self.admit_reader(request)
        if request.method not in SAFE_METHODS and role_of(request) is not Role.OPERATE:
            raise HTTPException(403, f"refused: {actor_of(request)} may look at tasks, and not change them")

    async def admit_reader(self, request: Request) -> None:
        """The same for the few that change no task: who may read may log out, and choose how pages look."""
        await self.admit_origin(request)
        if self._backend is None:
            if not is_local(request):
                raise HTTPException(403, LOCAL_ONLY)
            request.state.taskflow_actor, request.state.taskflow_role = "anonymous", Role.OPERATE
            return
        try:
            session = await self.session(request)
        except BackendUnavailable:  # a logout elsewhere cannot be ruled out: only what shows no task goes on
            session = self.signed(request) if request.url.path.endswith(SHOWS_NO_TASK) else None
            if session is None:
                raise
        if session is None:
            raise HTTPException(401, "log in first")
        request.state.taskflow_actor, request.state.taskflow_role = session.username, session.role

    async def admit_origin(self, request: Request) -> None:
        """Raises HTTPException 403 when another site's page sent this."""
        if request.method not in SAFE_METHODS and not same_origin(request):
            raise HTTPException(403, "refused: the request comes from another site")

    def signed(self, request: HTTPConnection) -> Session | None:
        """Whose request this is, as far as this process knows."""
        token = request.cookies.get(COOKIE)
        return self.sessions.read(token) if token else None

    async def session(self, request: HTTPConnection) -> Session | None:
        """Whose request this is; None when they have to log in, or were logged out by any process.

        Raises BackendUnavailable where that cannot be known.
        """
        session = self.signed(request)
        if session is not None and await self._visits.ended(session.session_id):
            self.sessions.revoke(session)
            return None
        return session

    async def log_in(self, request: Request, username: str, password: str) -> str | None:
        """A new session's token, or None when the credentials are wrong. Raises HTTPException 429."""
        client = client_name(request)
        if not self.limit.attempt(client, username):
            raise HTTPException(429, "too many failed logins: wait a minute", {"Retry-After": "60"})
        if self._backend is None:
            return None
        role = await judge(self._backend, username, password)
        if role is None:
            await self._visits.was_refused(username, client)
            return None
        self.limit.succeeded(client, username)
        await self._visits.logged_in(username, client)
        return self.sessions.issue(username, role)

    async def log_out(self, request: Request) -> None:
        """Ends the request's session: here at once, elsewhere within a second or two."""
        session = self.signed(request)
        if session is not None:
            self.sessions.revoke(session)
            await self._visits.logged_out(session.username, client_name(request), session.session_id, session.expires)


async def judge(backend: TaskAuthBackend, username: str, password: str) -> Role | None:
    """Whom a backend of either colour lets in, and as what; a plain function may block and gets a thread. One that
    raises, or says what is no role, lets nobody in."""
    try:
        if inspect.iscoroutinefunction(backend.authenticate_user):
            verdict = await backend.authenticate_user(username, password)
        else:
            verdict = await run_in_threadpool(backend.authenticate_user, username, password)
            verdict = await verdict if inspect.isawaitable(verdict) else verdict
        return role_named(verdict)
    except Exception:
        logger.exception("the authentication backend could not say who %r is: refused", username[:80])
        return None


def role_named(verdict: object) -> Role | None:
    """Raises ValueError for a text that names no role."""
    if isinstance(verdict, str):
        return Role(verdict)
    return Role.OPERATE if verdict else None


def role_of(request: Request) -> Role:
    role: Role = request.state.taskflow_role
    return role


def actor_of(request: Request) -> str:
    """Who does this, for the event log."""
    return str(request.state.taskflow_actor)


def same_origin(request: HTTPConnection) -> bool:
    """Whether our own page, or no browser at all, sent this. Browsers leave Sec-Fetch-Site out on plain http."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        theirs = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    return theirs == request.headers.get("host", "").lower() != ""


def is_local(request: HTTPConnection) -> bool:
    """Whether the client is on this machine and asked for it by a local name.

    What a proxy forwards is from elsewhere, and so is whatever cannot be told. A public host name with a loopback
    address is another site's page that made its own name point here, to read what only local pages may.
    """
    if request.client is None or is_forwarded(request):
        return False
    client, host = request.client.host, host_name(request)
    return (client == TEST_CLIENT or is_loopback(client)) and (
        is_local_name(host) or (client, host) == (TEST_CLIENT, TEST_HOST)
    )


def is_forwarded(request: HTTPConnection) -> bool:
    names = request.headers.keys()
    return any(name in FORWARDED or name.startswith(FORWARDED_PREFIXES) for name in names)


def host_name(request: HTTPConnection) -> str:
    """The name that the client asked for; nothing where it is not said, or said twice, or is none."""
    said = request.headers.getlist("host")
    found = HOST.fullmatch(said[0]) if len(said) == 1 else None
    return (found["v6"] or found["name"]).lower() if found else ""


def is_local_name(host: str) -> bool:
    return is_loopback(host) or host == "localhost" or host.endswith(".localhost")


def is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def client_name(request: HTTPConnection) -> str:
    """Whom a bad login is held against: an address, for IPv6 the network that one customer has."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host)
    except ValueError:
        return host[:64]
    return str(address) if address.version == 4 else address.exploded[:19]
