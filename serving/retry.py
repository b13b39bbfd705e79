"""When a request is sent again, in one place: inference is idempotent, so a lost answer may be asked for once more.

Every try has a deadline of its own, which the caller sets. Where several servers stand behind one address, the next try
reaches another one.
"""

import random
import time
from http.client import HTTPException

from tritonclient.utils import InferenceServerException

TRIES = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
UNAVAILABLE = ("StatusCode.UNAVAILABLE", "502", "503")  # over gRPC, and what a proxy says over HTTP
LATE = ("StatusCode.DEADLINE_EXCEEDED", "504")


def is_passing(error, late):
    """Whether another try may succeed: the connection failed, or the server or its proxy is unavailable.

    late: whether an answer that did not come in time counts too. A bad request fails the same way each time.
    """
    if isinstance(error, InferenceServerException):
        return error.status() in (UNAVAILABLE + LATE if late else UNAVAILABLE)
    if isinstance(error, TimeoutError):
        return late
    return isinstance(error, ConnectionError | HTTPException)


def retry(call, tries=TRIES, late=False, sleep=time.sleep):
    """What call() returns, from the first of so many tries that succeeds; raises the error of the last one.

    Between two tries it waits for a random time that doubles at most, so that clients do not come back together.
    """
    for number in range(tries):
        try:
            return call()
        except Exception as error:
            if number + 1 == tries or not is_passing(error, late):
                raise
        sleep(random.uniform(0.5, 1) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**number))
