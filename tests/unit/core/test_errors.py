from __future__ import annotations

import inspect
import pickle

import grpc
import pytest

from services.core import errors
from services.core.errors import ExpertfleetError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ExpertfleetError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling_with_its_details(kind: type[ExpertfleetError]) -> None:
    error = kind("what to do", layer=3, expert=1)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.message == str(copy) == "what to do"
    assert copy.details == error.details
    assert error.details.items() >= {"layer": 3, "expert": 1}.items()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_maps_to_known_statuses(kind: type[ExpertfleetError]) -> None:
    assert kind.grpc_status in grpc.StatusCode.__members__
    assert 400 <= kind.http_status < 600
