import pytest

from orchestrator.errors import UsageError
from orchestrator.scheduler.claims import RunClaims


def test_a_run_is_claimed_once_and_others_are_free() -> None:
    claims = RunClaims()
    with claims.claim("one"):
        with pytest.raises(UsageError, match="run one is being submitted, resumed or removed"), claims.claim("one"):
            pass
        with claims.claim("two"):
            pass
    with claims.claim("one"):
        pass


def test_a_removal_that_outlasts_its_request_keeps_the_claim() -> None:
    claims = RunClaims()
    with claims.claim("one"):
        removal = claims.extended("one")
        removal.__enter__()
    with pytest.raises(UsageError), claims.claim("one"):
        pass
    removal.__exit__(None, None, None)
    with claims.claim("one"):
        pass
