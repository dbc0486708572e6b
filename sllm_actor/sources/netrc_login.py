"""The credentials that people keep in ~/.netrc, or in the file that NETRC names."""

from __future__ import annotations

import asyncio
import base64
import netrc
import os

from sllm_actor.errors import SourceRefused


async def authorization_for(host: str) -> str:
    """Return the value of the Authorization header for a host, or nothing.

    Raises:
        SourceRefused: the file can't be used; the message repeats nothing of it.
    """
    return await asyncio.get_running_loop().run_in_executor(None, _read, host)


def _read(host: str) -> str:
    named = os.environ.get("NETRC")
    try:
        # Without a name it looks at the home folder, and refuses a file that others could have written.
        login = netrc.netrc(named).authenticators(host)
    except FileNotFoundError:
        return ""
    except netrc.NetrcParseError as wrong:
        raise SourceRefused(f"{named or '~/.netrc'} can't be used, line {wrong.lineno}") from None
    except (OSError, UnicodeDecodeError, RuntimeError):
        raise SourceRefused(f"{named or '~/.netrc'} can't be read") from None
    if login is None:
        return ""
    user, _, password = login
    return basic(user, password)


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header for a name and a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
